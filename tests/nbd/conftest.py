"""The NBD tests run on uvloop, as the daemon does."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from tests.nbd.memory_node import MemoryNode


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def node() -> MemoryNode:
    """A disk of 4 MiB, all holes."""
    return MemoryNode(4 << 20)

"""What commands work on."""

from collections.abc import Callable
from typing import NamedTuple

from blockd.devices.device import Devices
from blockd.devices.exports import Exports
from blockd.devices.left_out import LeftOut
from blockd.devices.streams import Streams
from blockd.drivers import NodeGraph
from blockd.jobs.manager import JobManager
from blockd.objects import Objects
from blockd.qmp.events import EventBus


class Services(NamedTuple):
    """The parts of the daemon that commands steer."""

    graph: NodeGraph
    devices: Devices
    streams: Streams
    jobs: JobManager
    exports: Exports
    events: EventBus
    # Makes the daemon end once the reply is out.
    stop: Callable[[], None]
    objects: Objects
    left_out: LeftOut

"""The proof that the sweep is worth anything: every call that keeps an order on the disk, left out in turn.

    python -m tests.crash.mutations        prints the table of docs/durability.md

The calls are found in the source, so that none can be forgotten: one that is new has no purpose in
`SITES` yet, and a test says so. A call is left out of the running code, and put back after the sweep.
"""

import ast
import asyncio
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

from blockd.devices import overlays
from blockd.errors import BlockdError
from blockd.exports.nbd import requests
from blockd.filters import blkstream
from blockd.formats.add_cow import checkpoint as add_cow_checkpoint
from blockd.formats.add_cow import create as add_cow_create
from blockd.formats.add_cow import image as add_cow_image
from blockd.formats.add_cow import metadata as add_cow_metadata
from blockd.formats.qcow2 import checkpoint, create, image, leaks, metadata, repair
from blockd.formats.qed import checkpoint as qed_checkpoint
from blockd.formats.qed import create as qed_create
from blockd.formats.qed import image as qed_image
from blockd.formats.qed import metadata as qed_metadata
from blockd.formats.qed import repair as qed_repair
from blockd.formats.raw import create as raw_create
from blockd.formats.raw import image as raw_image
from blockd.jobs import stream
from blockd.protocols import new_file
from tests.crash.add_cow import ADD_COW_SWEEPS, ADD_COW_WORKLOADS
from tests.crash.creation import sweep_creation
from tests.crash.judge import Judge
from tests.crash.promises import SWEEPS, Sweep
from tests.crash.qed import QED_SWEEPS, QED_WORKLOADS
from tests.crash.workloads import WORKLOADS, Workload

MODULES: list[ModuleType] = [
    *(checkpoint, create, image, leaks, metadata, repair),
    *(qed_checkpoint, qed_create, qed_image, qed_metadata, qed_repair),
    *(add_cow_checkpoint, add_cow_create, add_cow_image, add_cow_metadata),
    *(raw_create, raw_image, new_file, overlays, stream, requests, blkstream),
]
# A statement that calls one of these keeps an order, or a promise.
ORDERING_CALLS = {"sync_blocking", "flush", "_flush", "checkpoint_locked", "settle", "flush_staged"}

ANY_MOMENT = "any moment is good enough for a checkpoint"
BY_POLICY = "`change_backing` makes the same checkpoint; here errors meet the on-error policy"
# What the calls are for, by function, in the order of the source.
SITES: dict[str, list[str]] = {
    "formats.qcow2.checkpoint.write_refcounts": ["new refcount block → its table entry"],
    "formats.qcow2.checkpoint.write_checkpoint": [
        "data, refcounts → new L2 table, refcount table entry",
        "new L2 table, refcount table entry → map",
        "map → acknowledged",
    ],
    "formats.qcow2.checkpoint.lengthen": ["file longer than the refcounts tell → refcounts (version 2)"],
    "formats.qcow2.checkpoint.move_l1": ["larger L1 table → header"],
    "formats.qcow2.checkpoint.move_refcount_table": ["larger refcount table → header"],
    "formats.qcow2.checkpoint.write_header_field": ["header field → what relies on it"],
    "formats.qcow2.checkpoint.write_last_field": ["leaks given back → no longer marked as in use"],
    "formats.qcow2.checkpoint.write_header_change": [
        "backing file name past the first sector → first sector",
        "header → completion event",
    ],
    "formats.qcow2.create._write_image": [
        "old header gone → tables of the new image",
        "tables of the new image → its header",
        "its header → created",
    ],
    "formats.qcow2.image.Qcow2Image.flush": ["checkpoint → flush acknowledged"],
    "formats.qcow2.image.Qcow2Image._settle": ["checkpoint → closed, or backing of another image"],
    "formats.qcow2.leaks.LeakSearch._free": ["what waits for a checkpoint stays little", "leaks free → told"],
    "formats.qcow2.metadata.Metadata.relieve": ["memory stays bounded"],
    "formats.qcow2.metadata.Metadata._flush": ["checkpoint → flush acknowledged"],
    "formats.qcow2.metadata.Metadata.trim": ["refcounts without what was given back → file cut"],
    "formats.qcow2.metadata.Metadata.settle": ["map → closed"],
    "formats.qcow2.metadata.Metadata.change_backing": ["data and map → header without the old backing"],
    "formats.qcow2.metadata.Metadata.set_size": ["zeroes over the backing → larger size"],
    "formats.qcow2.metadata.Metadata._use_for_l1": ["refcounts of the larger L1 table → header"],
    "formats.qcow2.repair._write_steps": [
        "new refcount table and blocks → header",
        "refcounts and flags → no longer marked dirty or corrupt",
    ],
    "formats.qcow2.repair._finish_steps": ["no longer marked dirty or corrupt → repaired"],
    "formats.qed.checkpoint.write_checkpoint": [
        "data → new L2 table",
        "new L2 table → map",
        "map → acknowledged",
    ],
    "formats.qed.checkpoint.write_header_field": ["header field → what relies on it"],
    "formats.qed.checkpoint.write_last_field": ["file cut → need-check bit cleared"],
    "formats.qed.checkpoint.write_header_change": [
        "backing file name → first sector",
        "header → completion event",
    ],
    "formats.qed.create._write_image": [
        "old header gone → the new image",
        "length, backing file name → first sector",
        "first sector → created",
    ],
    "formats.qed.image.QedImage.flush": ["checkpoint → flush acknowledged"],
    "formats.qed.image.QedImage.reopen": ["checkpoint → backing of another image (switch, snapshot)"],
    "formats.qed.image.QedImage.close": ["checkpoint → closed"],
    "formats.qed.metadata.Metadata.relieve": ["memory stays bounded"],
    "formats.qed.metadata.Metadata._flush": ["checkpoint → flush acknowledged"],
    "formats.qed.metadata.Metadata.settle": ["map → need-check bit cleared, closed"],
    "formats.qed.metadata.Metadata.change_backing": ["data and map → header without the old backing"],
    "formats.qed.metadata.Metadata.set_size": ["zeroes over the backing → larger size"],
    "formats.qed.repair._clear_entries": ["entries repaired → need-check bit cleared"],
    "formats.qed.repair._mark_clean": ["need-check bit cleared → repaired"],
    "formats.qed.repair._give_back": ["space of leaks given back → repaired"],
    "formats.add_cow.checkpoint.write_checkpoint": ["data → bits", "bits → acknowledged"],
    "formats.add_cow.checkpoint.write_name": ["backing file name → first sector"],
    "formats.add_cow.checkpoint.write_header": ["header → completion event"],
    "formats.add_cow.checkpoint.grow_bitmap": ["longer bitmap → larger image"],
    "formats.add_cow.checkpoint.set_length": ["larger image → resized"],
    "formats.add_cow.create._write": ["bitmap, names → first sector", "first sector → created"],
    "formats.add_cow.create._clear": ["old header gone → the new bitmap"],
    "formats.add_cow.image.AddCowImage.flush": ["checkpoint → flush acknowledged"],
    "formats.add_cow.image.AddCowImage.reopen": ["checkpoint → backing of another image (switch, snapshot)"],
    "formats.add_cow.image.AddCowImage.close": ["checkpoint → closed"],
    "formats.add_cow.metadata.Metadata.relieve": ["memory stays bounded"],
    "formats.add_cow.metadata.Metadata._flush": ["checkpoint → flush acknowledged"],
    "formats.add_cow.metadata.Metadata.change_backing": ["data and bits → header without the old backing"],
    "formats.add_cow.metadata.Metadata.set_size": ["zeroes over the backing → larger size"],
    "formats.raw.create._set_length": ["length → created"],
    "formats.raw.image.RawImage.flush": ["data → flush acknowledged"],
    "formats.raw.image.RawImage.reopen": ["data → backing of another image"],
    "formats.raw.image.RawImage.close": ["data → closed"],
    "protocols.new_file.new_file": ["content → created", "name → created"],
    "devices.overlays.PutOverlay._make_durable": ["content of an overlay → switch", "its name → switch"],
    "jobs.stream.StreamJob.run": ["copies → pending"],
    "jobs.stream.StreamJob._flush": ["copies → pending"],
    "jobs.stream.StreamJob._make_checkpoints": ["copies → not copied again after a crash"],
    "exports.nbd.requests._carried_out": ["data → write with FUA acknowledged"],
    "filters.blkstream.BlkStream.flush": ["staged writes → flush acknowledged", "data → flush acknowledged"],
    "exports.nbd.requests._flush": ["data → flush acknowledged"],
}
# Leaving these out costs no data, and why.
SPACE_ONLY = "clusters stay leaked that nothing tells of: it costs space only"
HARMLESS: dict[str, str] = {
    "formats.qcow2.checkpoint.lengthen": SPACE_ONLY,
    "formats.qcow2.leaks.LeakSearch._free": ANY_MOMENT,
    "formats.qcow2.metadata.Metadata.relieve": ANY_MOMENT,
    "formats.qed.metadata.Metadata.relieve": ANY_MOMENT,
    "formats.add_cow.metadata.Metadata.relieve": ANY_MOMENT,
    "formats.qcow2.metadata.Metadata.trim": SPACE_ONLY,
    "formats.qed.checkpoint.write_last_field": SPACE_ONLY,
    "formats.qed.repair._clear_entries": "the sync of `_give_back` also comes before the bit is cleared",
    "formats.qed.repair._give_back": SPACE_ONLY,
    "jobs.stream.StreamJob.run": BY_POLICY,
    "jobs.stream.StreamJob._flush": BY_POLICY,
}


class Found(NamedTuple):
    """A call in the source: the `number`-th, from 0 on, of the function of this name."""

    name: str
    number: int

    @property
    def purpose(self) -> str:
        return SITES[self.name][self.number]

    def __str__(self) -> str:
        return f"{self.name} {self.number + 1}"


# -- leaving calls out ------------------------------------------------------------------------------


def find_calls() -> list[Found]:
    """Every ordering call of the modules, in the order of the source."""
    return [
        Found(name, number)
        for name, function in _functions().items()
        for number in range(len(_statements(_parse(function))))
    ]


def _functions() -> dict[str, FunctionType]:
    """All functions and methods of the modules by name."""
    found: dict[str, FunctionType] = {}
    for module in MODULES:
        for value in vars(module).values():
            for wrapped in vars(value).values() if inspect.isclass(value) else [value]:
                # What dataclasses generate comes from no file.
                member = inspect.unwrap(wrapped) if callable(wrapped) else wrapped
                if inspect.isfunction(member) and member.__code__.co_filename == module.__file__:
                    found[f"{module.__name__.removeprefix('blockd.')}.{member.__qualname__}"] = member
    return found


def _parse(function: FunctionType) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """The statements that are nothing but an ordering call, waited for or not, returned or not."""
    found: list[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.Return):
            value = node.value.value if isinstance(node.value, ast.Await) else node.value
            if isinstance(value, ast.Call) and _is_ordering(value):
                found.append(node)
    return sorted(found, key=lambda node: node.lineno)


def _is_ordering(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ORDERING_CALLS
    return ast.unparse(call).startswith("in_thread(sync_folder, ")


@contextmanager
def left_out(call: Found) -> Iterator[None]:
    """Run without one call."""
    function = _functions()[call.name]
    tree = _parse(function)
    _Without(_statements(tree)[call.number]).visit(tree)
    compiled = compile(ast.fix_missing_locations(tree), function.__code__.co_filename, "exec")
    before = function.__code__
    function.__code__ = _code_of(compiled, function.__name__)
    try:
        yield
    finally:
        function.__code__ = before


class _Without(ast.NodeTransformer):
    def __init__(self, statement: ast.stmt) -> None:
        self._statement = statement

    def visit(self, node: ast.AST) -> ast.AST:
        if node is not self._statement:
            visited: ast.AST = super().visit(node)
            return visited
        return ast.copy_location(ast.Return(None) if isinstance(node, ast.Return) else ast.Pass(), node)


def _code_of(module_code: CodeType, name: str) -> CodeType:
    return next(
        constant
        for constant in module_code.co_consts
        if isinstance(constant, CodeType) and constant.co_name == name
    )


# -- the proof --------------------------------------------------------------------------------------


async def _sweep_workload(workload: Workload) -> None:
    async with workload.scene().running() as scene:
        await workload.run(scene)
    await Judge(rerun_every=0).sweep(scene, subset_count=4)


def _sweeps(call: Found) -> Iterator[tuple[str, Sweep]]:
    """The reduced sweep of the format that a call belongs to, the quick parts first."""
    workloads, sweeps = WORKLOADS, [sweep_creation, *SWEEPS]
    if call.name.startswith("formats.qed."):
        workloads, sweeps = QED_WORKLOADS, QED_SWEEPS
    elif call.name.startswith("formats.add_cow."):
        workloads, sweeps = ADD_COW_WORKLOADS, ADD_COW_SWEEPS
    for workload in workloads:
        if not workload.is_large:
            yield str(workload), lambda workload=workload: _sweep_workload(workload)  # type: ignore[misc]
    for sweep in sweeps:
        yield sweep.__name__, sweep
    for workload in workloads:
        if workload.is_large:
            yield str(workload), lambda workload=workload: _sweep_workload(workload)  # type: ignore[misc]


async def noticed_by(call: Found) -> str | None:
    """Which part of the sweep shows that without a call something is lost; None: no part does."""
    with left_out(call):
        for name, sweep in _sweeps(call):
            try:
                await sweep()
            except (AssertionError, BlockdError):
                return name
    return None


def main() -> None:
    print("| left out | what it orders | noticed by |\n|---|---|---|")
    for call in find_calls():
        noticed = asyncio.run(noticed_by(call))
        result = f"`{noticed}`" if noticed else f"not observable: {HARMLESS.get(call.name, '???')}"
        print(f"| `{call}` | {call.purpose} | {result} |", flush=True)


if __name__ == "__main__":
    main()

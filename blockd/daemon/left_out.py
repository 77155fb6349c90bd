"""Restoring one thing after the other: what cannot be is reported and left out, and stays in the journal."""

import logging
from collections.abc import Awaitable, Callable

from blockd.block.node import BlockNode
from blockd.commands.context import Services
from blockd.daemon.state import JobRecord, LostWritesRecord, StagedRecord, State, Things
from blockd.devices.left_out import Kind, LeftOut, Thing
from blockd.errors import BlockdError, RequestError
from blockd.filenames import absolute

log = logging.getLogger(__name__)


class Attempts:
    """Tries to restore things; with `is_strict` the first that cannot be is an error."""

    def __init__(self, left_out: LeftOut, *, is_strict: bool) -> None:
        self._left_out = left_out
        self._is_strict = is_strict

    async def __call__(
        self, kind: Kind, name: str, restore: Callable[[], Awaitable[None]], *, node: str | None = None
    ) -> bool:
        """Restore one thing, which needs `node`; tell whether it is there.

        Raises:   BlockdError: it cannot be, and that is strict.
        """
        cause: object = None
        try:
            self._require(node)
            await restore()
            return True
        except BlockdError as error:
            if self._is_strict:
                raise RequestError(f"{kind} '{name}': {error.message}", kind=error.kind) from error
            reason, cause = error.message, error.context.get("missing_node")
        except Exception:
            if self._is_strict:
                raise
            log.exception("%s '%s': internal error", kind, name)
            reason = "internal error, see the log"
        self._left_out.add(Thing(kind, name, reason, node, cause if isinstance(cause, str) else None))
        return False

    def leave_out(self, kind: Kind, name: str, *, needs: str, missing: str) -> None:
        """Go on without a thing that needs a node, for the node `missing` is not restored."""
        self._left_out.add(Thing(kind, name, not_restored(missing), needs, missing))

    def _require(self, node: str | None) -> None:
        if node is not None and self._left_out.get(Kind.NODE, node) is not None:
            raise RequestError(not_restored(node), missing_node=node)


def not_restored(node: str) -> str:
    """Why something is left out that needs a node."""
    return f"the node '{node}' is not restored"


def log_left_out(left_out: LeftOut) -> None:
    """Log an error for each thing that went wrong, with all that is left out because of it."""
    for things in left_out.by_root():
        by_use = sorted(things, key=lambda thing: thing.kind is Kind.NODE)  # names of nodes say little
        names = ", ".join(f"{thing.kind} '{thing.name}'" for thing in by_use)
        verbs = "is not restored, and stays" if len(things) == 1 else "are not restored, and stay"
        log.error("%s %s in the journal: %s", names, verbs, things[0].reason)


def merged(state: State) -> State:
    """The state with what was left out in its place again, to be tried anew."""
    late = state.left_out
    if late is None:
        return state
    present = {node.name for node in state.nodes}
    first_group = 1 + max((job.group for job in state.jobs if job.group is not None), default=-1)
    return state.model_copy(
        update={
            "throttle_groups": [*state.throttle_groups, *late.throttle_groups],
            "nodes": [*state.nodes, *(node for node in late.nodes if node.name not in present)],
            "devices": [*state.devices, *late.devices],
            "exports": [*state.exports, *late.exports],
            "jobs": [*state.jobs, *(_in_group_from(first_group, job) for job in late.jobs)],
            "left_out": None,
        }
    )


def _in_group_from(first: int, job: JobRecord) -> JobRecord:
    return job if job.group is None else job.model_copy(update={"group": job.group + first})


def records_of(left_out: LeftOut, earlier: State, services: Services) -> Things | None:
    """What of an earlier state is left out still, with the nodes that it takes; None: nothing."""
    for thing in left_out:
        if is_there(thing.kind, thing.name, services):
            log.warning(
                "%s '%s' could not be restored, and is forgotten now: there is another one of that name",
                *(thing.kind, thing.name),
            )
            left_out.replace(thing.kind, thing.name)
    if not any(left_out):
        return None

    def are_out(kind: Kind, names: set[str]) -> set[str]:
        return {name for name in names if left_out.get(kind, name) is not None}

    nodes = are_out(Kind.NODE, {node.name for node in earlier.nodes})
    needed = nodes | {thing.node for thing in left_out if thing.node is not None}
    below = _with_those_below(needed, earlier)
    groups = are_out(Kind.THROTTLE_GROUP, {group.id for group in earlier.throttle_groups})
    devices = are_out(Kind.DEVICE, {device.name for device in earlier.devices})
    exports = are_out(Kind.EXPORT, {export.id for export in earlier.exports})
    jobs = are_out(Kind.JOB, {job.id for job in earlier.jobs})
    return Things(
        throttle_groups=[group for group in earlier.throttle_groups if group.id in groups],
        nodes=[node for node in earlier.nodes if node.name in below],
        devices=[device for device in earlier.devices if device.name in devices],
        exports=[export for export in earlier.exports if export.id in exports],
        jobs=[job for job in earlier.jobs if job.id in jobs],
    )


def is_there(kind: Kind, name: str, services: Services) -> bool:
    """Whether the daemon has a thing of this name."""
    match kind:
        case Kind.THROTTLE_GROUP:
            return services.objects.get(name) is not None
        case Kind.NODE:
            return name in services.graph.nodes
        case Kind.DEVICE:
            return any(device.name == name for device in services.devices)
        case Kind.EXPORT:
            return any(offer.export.export_id == name for offer in services.exports)
        case Kind.JOB:
            return services.jobs.get(name) is not None


def _with_those_below(names: set[str], earlier: State) -> set[str]:
    """Some nodes of a state, and all that they stand on: whoever is above comes later in the state."""
    found = set(names)
    for node in reversed(earlier.nodes):
        if node.name in found:
            found.update(node.below)
    return found


class Unplaced:
    """What an earlier run knew of guests' writes to images that are not there: kept, or lost and not told.

    It waits for a start that has the image. If the node of the image is given up or replaced, it is lost:
    another disk of that name gets none of it.
    """

    def __init__(self, earlier: State, services: Services) -> None:
        nodes = services.graph.nodes
        self._services = services
        self._earlier = earlier
        self.staged = [record for record in earlier.staged if record.node not in nodes]
        self.lost_writes = [record for record in earlier.lost_writes if record.node not in nodes]

    def lose_given_up(self) -> None:
        """Let the guests know of what cannot come back; see `records_of`, which tells what is left out."""
        for staged in filter(self._is_given_up, self.staged):
            self._lose(staged.node, staged.length, f"node '{staged.node}' was given up while it was left out")
        for lost in filter(self._is_given_up, self.lost_writes):
            if (image := self._same_image(lost.node)) is not None:
                self._services.devices.note_loss(image, lost.why)
        self.staged = [record for record in self.staged if not self._is_given_up(record)]
        self.lost_writes = [record for record in self.lost_writes if not self._is_given_up(record)]

    def _is_given_up(self, record: StagedRecord | LostWritesRecord) -> bool:
        return self._services.left_out.get(Kind.NODE, record.node) is None

    def _lose(self, node: str, length: int, why: str) -> None:
        devices = self._services.devices
        if (image := self._same_image(node)) is not None:
            devices.lose(image, length, why)
        else:
            log.error("acknowledged writes are lost, %d bytes: %s", length, why)
            devices.on_lost("", node, length, why)

    def _same_image(self, node: str) -> BlockNode | None:
        """The image that was left out, if a client has opened it anew under its name."""
        image = self._services.graph.nodes.get(node)
        options = {record.name: record.options for record in self._earlier.nodes}
        file = options.get(node, {}).get("file")
        filename = options.get(str(file), {}).get("filename")
        return image if image is not None and absolute(image.filename) == filename else None

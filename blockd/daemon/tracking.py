"""Keeps the recorded state up to date with the daemon, at a cost that depends on what has changed.

The graph notes which nodes were touched since it was last asked. What is recorded of a node, and of the
devices and exports on it, follows from the node, from what is above and below, and from the streams in front:
so all that is touched is described anew, with what is below it. The rest of the state is small, and compared.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from pydantic import BaseModel

from blockd.aio import Turns
from blockd.block.chain import all_below
from blockd.block.node import BlockNode
from blockd.commands.context import Services
from blockd.daemon.changes import Changes, Json, RecordedState
from blockd.daemon.snapshot import (
    NodeRecords,
    Rest,
    device_record,
    export_record,
    job_records,
    small_parts,
)
from blockd.daemon.state import SmallParts
from blockd.jobs.job import Job

# A table and a key in it.
Place = tuple[str, str]


class Tracker:
    """What is recorded, by the names of the nodes that it belongs to."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._graph = services.graph
        self._places: dict[str, set[Place]] = {}
        # What the records of some nodes follow from besides the graph: as it was.
        self._context: dict[BlockNode, object] = {}
        # The nodes that were touched and are not described anew yet.
        self._touched: dict[str, None] = {}

    def begin(self) -> None:
        """Learn what is recorded already: all that there is."""
        self._graph.nodes.take_touched()
        nodes = NodeRecords(self._services)
        self._context = nodes.context()
        for name, node in self._graph.nodes.items():
            self._places[name] = {place for place, _ in self._things(node, nodes)}

    async def update(self, state: RecordedState, changes: Changes, rest: Rest, ending: Job | None) -> None:
        """Bring the state up to date, in turns, and add what is different to `changes`.

        The end of the job `ending` counts as told.

        Needs:    no change is under way. What is touched meanwhile all the same counts for the next time.
        Fails to: nothing is changed or forgotten; the next time tells it all.
        """
        nodes = NodeRecords(self._services)
        self._touched |= self._graph.nodes.take_touched()
        context = nodes.context()
        changed = [node.node_name for node in self._changed_context(context)]
        found = await self._described({**self._touched, **dict.fromkeys(changed)}, nodes)
        jobs = {record.id: record.model_dump() for record in job_records(self._services, nodes, ending)}
        values = SmallParts(**small_parts(self._services, nodes, rest)).model_dump()
        # All that can fail is done.
        self._put(state, changes, found)
        for job_id in [*state.tables["jobs"].keys() - jobs.keys(), *jobs]:
            state.set(changes, "jobs", job_id, jobs.get(job_id))
        for name in {**state.values, **values}:
            state.set_value(changes, name, values.get(name))
        self._context, self._touched = context, {}

    async def _described(self, names: Iterable[str], nodes: NodeRecords) -> dict[str, dict[Place, Json]]:
        """What is to be recorded of some nodes and those below them, each after those below it."""
        found: dict[str, dict[Place, Json]] = {}
        turns = Turns()
        for name in self._with_those_below(names):
            await turns.pass_on()
            node = self._graph.nodes.get(name)
            found[name] = {} if node is None else dict(self._records(node, nodes))
        return found

    def _put(self, state: RecordedState, changes: Changes, found: Mapping[str, Mapping[Place, Json]]) -> None:
        """Bring the tables of nodes, devices, exports and allowed files up to date."""
        come = {place: record for records in found.values() for place, record in records.items()}
        before = {place: None for name in found for place in self._places.get(name, ())}
        for table, key in before.keys() - come.keys():
            if table != "allowed-files" or not self._graph.image_paths.is_allowed_file(key):
                state.set(changes, table, key, None)
        for (table, key), record in come.items():
            state.set(changes, table, key, record)
        self._places.update((name, {*records}) for name, records in found.items() if records)
        for name in [name for name, records in found.items() if not records]:
            self._places.pop(name, None)

    def _changed_context(self, context: Mapping[BlockNode, object]) -> Iterable[BlockNode]:
        """The nodes of which streams, and commands under way, make something else than before."""
        before = self._context
        return [node for node in {**before, **context} if before.get(node) != context.get(node)]

    def _with_those_below(self, names: Iterable[str]) -> Iterator[str]:
        """Nodes and those below them, each after those below it."""
        told: set[str] = set()
        for name in names:
            node = self._graph.nodes.get(name)
            below = [] if node is None else [found.node_name for found in all_below(node)]
            for found in [*reversed(below), name]:
                if found not in told:
                    told.add(found)
                    yield found

    def _records(self, node: BlockNode, nodes: NodeRecords) -> Iterator[tuple[Place, Json]]:
        for place, describe in self._things(node, nodes):
            record = describe()
            yield place, record.model_dump() if isinstance(record, BaseModel) else record

    def _things(
        self, node: BlockNode, nodes: NodeRecords
    ) -> Iterator[tuple[Place, Callable[[], BaseModel | str]]]:
        """What is recorded of a node, and how it is described."""
        if nodes.is_recorded(node):
            yield ("nodes", node.node_name), partial(nodes.record, node)
        for device in self._services.devices.at(node):
            if device.name:
                yield ("devices", device.name), partial(device_record, device, nodes)
            for export_id in device.exports:
                offer = self._services.exports.get(export_id)
                if offer is not None:
                    yield ("exports", export_id), partial(export_record, offer, nodes)
        location = self._graph.image_paths.location_of(node)
        if location is not None:
            yield ("allowed-files", location), partial(str, location)

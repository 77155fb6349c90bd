"""Scenarios of the NBD server and its exports."""

from tests.differential.nodes import chain_nodes, file_node, image_node
from tests.differential.pair import FOLDER, Scenario, Send, call

ADDRESS = {"type": "unix", "data": {"path": f"{FOLDER}/nbd"}}
START = call("nbd-server-start", addr=ADDRESS)
EXPORTS = call("query-block-exports")


def export(export_id: str, node_name: str, **more: object) -> Send:
    return call("block-export-add", type="nbd", id=export_id, node_name=node_name, **more)


ARGUMENTS = Scenario(
    "arguments of export commands",
    [
        call("nbd-server-start"),
        call("nbd-server-start", addr=1),
        call("nbd-server-start", addr={}),
        call("nbd-server-start", addr={"type": "zap"}),
        call("nbd-server-start", addr={"type": 1}),
        call("nbd-server-start", addr={"type": "unix"}),
        call("nbd-server-start", addr={"type": "unix", "data": {}}),
        call("nbd-server-start", addr={"type": "unix", "data": {"path": 1}}),
        call("nbd-server-start", addr={"type": "unix", "data": {"path": "x", "bogus": 1}}),
        call("nbd-server-start", addr={"type": "unix", "data": {"path": "x"}, "bogus": 1}),
        call("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1"}}),
        call("nbd-server-start", addr=ADDRESS, max_connections=-1),
        call("nbd-server-start", addr=ADDRESS, max_connections="1"),
        call("nbd-server-start", addr=ADDRESS, max_connections=1 << 32),
        call("nbd-server-start", addr=ADDRESS, tls_creds="none"),
        call("nbd-server-stop", bogus=1),
        call("block-export-add"),
        call("block-export-add", type="zap", id="e", node_name="n"),
        call("block-export-add", type="nbd", node_name="n"),
        call("block-export-add", type="nbd", id="e"),
        call("block-export-add", type="nbd", id=1, node_name="n"),
        export("e", "n", name=1),
        export("e", "n", writable="on"),
        export("e", "n", writethrough="on"),
        export("e", "n", bogus=1),
        export("e", "n", description=1),
        call("block-export-del"),
        call("block-export-del", id=1),
        call("block-export-del", id="e", mode="zap"),
        call("nbd-server-add"),
        call("nbd-server-remove"),
        call("nbd-server-remove", name="e", mode="zap"),
        call("query-block-exports", bogus=1),
    ],
)

SERVER = Scenario(
    "the NBD server",
    [
        call("nbd-server-stop"),
        image_node("n", "alone.qcow2"),
        export("e", "n"),
        call("nbd-server-add", device="n"),
        START,
        call("object-add", qom_type="iothread", id="thread"),
        call("object-add", qom_type="throttle-group", id="group"),
        export("through", "n", writable=True, writethrough=True),
        call("block-export-del", id="through"),
        export("threaded", "n", iothread="none"),
        export("threaded", "n", iothread="group"),
        export("threaded", "n", iothread="thread", fixed_iothread=True),
        call("block-export-del", id="threaded"),
        START,
        call("nbd-server-stop"),
        call("nbd-server-stop"),
        call("nbd-server-start", addr={"type": "unix", "data": {"path": f"{FOLDER}/none/x"}}),
        START,
        export("e", "n"),
        EXPORTS,
        call("nbd-server-stop"),
        EXPORTS,
    ],
)

QUIT = Scenario(
    "quit with an export", [image_node("n", "alone.qcow2"), START, export("e", "n"), call("quit"), EXPORTS]
)

LIFE = Scenario(
    "exports come and go",
    [
        *chain_nodes(),
        file_node("f", "disk.raw"),
        START,
        EXPORTS,
        export("e", "none"),
        export("9bad", "top"),
        export("", "top"),
        export("a b", "top"),
        export("e", "top", writable=True),
        export("e", "f"),
        export("second", "f", name="top"),
        export("second", "f", name=""),
        export("third", "f", name="x" * 4096),
        export("third", "f", name="x" * 4097),
        export("fourth", "f", name="y", description="z" * 4097),
        export("fifth", "base", name="base", writable=True),
        export("sixth", "base", name="base", description="of all"),
        EXPORTS,
        call("blockdev-del", node_name="top"),
        call("blockdev-del", node_name="f"),
        call("block-export-del", id="none"),
        call("block-export-del", id="sixth"),
        call("block-export-del", id="sixth"),
        call("block-export-del", id="e", mode="hard"),
        call("block-export-del", id="second", mode="safe"),
        EXPORTS,
        call("blockdev-del", node_name="top"),
    ],
)

OLD_COMMANDS = Scenario(
    "nbd-server-add and nbd-server-remove",
    [
        image_node("n", "alone.qcow2"),
        file_node("ro", "base.qcow2", read_only=True),
        START,
        call("nbd-server-add", device="none"),
        call("nbd-server-add", device="n", writable=True),
        call("nbd-server-add", device="n"),
        call("nbd-server-add", device="n", name="other", description="text"),
        call("nbd-server-add", device="ro", writable=True),
        EXPORTS,
        call("nbd-server-remove", name="none"),
        call("nbd-server-remove", name="other"),
        call("block-export-del", id="n"),
        EXPORTS,
    ],
)

SCENARIOS = [ARGUMENTS, SERVER, QUIT, LIFE, OLD_COMMANDS]

"""What can happen to a disk, by name, and every short sequence of it."""

from collections.abc import Awaitable, Callable

from tests.crash.scene import BASE, Scene

Operation = Callable[[Scene], Awaitable[None]]

OPERATIONS: dict[str, Operation] = {
    "write a cluster": lambda scene: scene.write(2),
    "write a part": lambda scene: scene.write(2.25, 0.5),
    "write across": lambda scene: scene.write(1.5, 2),
    "zero": lambda scene: scene.zero(2, 2),
    "zero a part": lambda scene: scene.zero(2.5, 0.25),
    "discard": lambda scene: scene.discard(1, 3),
    "read": lambda scene: scene.read(1, 3),
    "stream step": lambda scene: scene.stream_step(),
    "flush": lambda scene: scene.flush(),
    "cancel": lambda scene: scene.cancel(),
    "complete": lambda scene: scene.complete(),
    "close": lambda scene: scene.close(),
    "grow": lambda scene: scene.grow(3),
    "switch": lambda scene: scene.switch(),
}
TARGETS = (None, BASE)


def is_possible(name: str, scene: Scene) -> bool:
    """Whether an operation can be asked for now."""
    if name == "cancel":
        return scene.is_streaming
    if name in ("stream step", "complete"):
        return scene.is_streaming or scene.can_stream
    if name == "switch":
        return not scene.is_streaming
    return True

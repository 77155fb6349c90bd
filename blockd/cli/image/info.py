"""`blockctl image info`: what an image is, in the shape of QEMU's ImageInfo."""

from collections.abc import Iterator, Mapping

from blockd.block.node import BlockNode, OverlayNode
from blockd.drivers import FORMATS
from blockd.filenames import full_name

Members = dict[str, object]


def describe(image: BlockNode, actual_size: int) -> Members:
    """Tell all there is to tell about one image, backing files left out.

    Needs:    a thread, for it asks the file system.
    """
    found: Members = {
        "filename": image.filename,
        "format": image.driver,
        "virtual-size": image.size,
        "actual-size": actual_size,
        "dirty-flag": False,
    }
    if image.cluster_size > 1:
        found["cluster-size"] = image.cluster_size
    if isinstance(image, OverlayNode) and image.backing_filename:
        found["backing-filename"] = image.backing_filename
        found["full-backing-filename"] = full_name(image.filename, image.backing_filename)
        if image.backing_format:
            found["backing-filename-format"] = image.backing_format
    entry = FORMATS[image.driver]
    if entry.info is not None:
        found.update(entry.info(image))
    return found


def description_lines(info: Mapping[str, object]) -> Iterator[str]:
    """Say it as `qemu-img info` does."""
    yield f"image: {info['filename']}"
    yield f"file format: {info['format']}"
    yield f"virtual size: {_size(info['virtual-size'])} ({info['virtual-size']} bytes)"
    yield f"disk size: {_size(info['actual-size'])}"
    if "cluster-size" in info:
        yield f"cluster_size: {info['cluster-size']}"
    if info.get("dirty-flag"):
        yield "cleanly shut down: no"
    if "backing-filename" in info:
        name, full = info["backing-filename"], info["full-backing-filename"]
        yield f"backing file: {name}" + ("" if name == full else f" (actual path: {full})")
        if "backing-filename-format" in info:
            yield f"backing file format: {info['backing-filename-format']}"
    if info.get("snapshots"):
        yield from _snapshot_lines(info["snapshots"])
    specific = info.get("format-specific")
    if isinstance(specific, dict):
        yield "Format specific information:"
        yield from _value_lines(specific["data"], 1)


def _size(value: object) -> str:
    """A size as QEMU writes it: three digits of the unit in which it is less than 1000."""
    assert isinstance(value, int)
    power = 0
    while value >= 1000 << 10 * power:
        power += 1
    return f"{value / (1 << 10 * power):.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[power]}B"


def _snapshot_lines(snapshots: object) -> Iterator[str]:
    from datetime import datetime  # noqa: PLC0415  (slow to load, and few images have snapshots)

    assert isinstance(snapshots, list)
    yield "Snapshot list:"
    yield f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    for snapshot in snapshots:
        date = datetime.fromtimestamp(snapshot["date-sec"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        minutes, seconds = divmod(snapshot["vm-clock-sec"], 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours:02}:{minutes:02}:{seconds:02}.{snapshot['vm-clock-nsec'] // 1_000_000:03}"
        size = _size(snapshot["vm-state-size"])
        icount = snapshot.get("icount", "")
        yield f"{snapshot['id']:<9} {snapshot['name']:<16} {size:>8}{date:>20}{clock:>13}{icount:>11}"


def _value_lines(value: object, depth: int) -> Iterator[str]:
    """Nested members and elements, each on a line of its own."""
    indent = "    " * depth
    if isinstance(value, Mapping):
        pairs = [(f"{name.replace('-', ' ')}:", member) for name, member in value.items()]
    else:
        assert isinstance(value, list)
        pairs = [(f"[{index}]:", element) for index, element in enumerate(value)]
    for label, member in pairs:
        if isinstance(member, Mapping | list):
            yield f"{indent}{label}"
            yield from _value_lines(member, depth + 1)
        else:
            yield f"{indent}{label} {_plain(member)}"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

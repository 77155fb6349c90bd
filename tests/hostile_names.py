"""Names in images that blockd itself would never write there: made by other programs, or by strangers."""

from pathlib import Path


def stand_in(name: str) -> str:
    """A name that may be written, of the same length."""
    return "x" * len(_encoded(name))


def put_name(path: Path, name: str) -> None:
    """Put a name in the place of its stand-in."""
    data, innocent = path.read_bytes(), _encoded(stand_in(name))
    assert data.count(innocent) == 1, "the stand-in is in the image once"
    path.write_bytes(data.replace(innocent, _encoded(name)))


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")

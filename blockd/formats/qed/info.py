"""What a QED image says about itself beside what every image does: whether it was closed cleanly."""

from blockd.formats.qed.header import Header


def image_info(header: Header) -> dict[str, object]:
    """The members that QEMU's ImageInfo has for this format."""
    return {"dirty-flag": header.needs_check}

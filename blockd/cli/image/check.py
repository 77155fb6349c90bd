"""`blockctl image check`: the verdict about one image file, told as `qemu-img check` tells it."""

from collections.abc import Iterator

from blockd.cli.image.opening import format_entry, opened_file
from blockd.errors import ErrorKind, RequestError
from blockd.formats.check_report import CheckReport, Repair

CORRUPT_STATUS = 2
LEAKS_STATUS = 3
NO_CHECK_STATUS = 63


class Unchecked(RequestError):
    """Images of this format hold nothing that could be checked."""

    default_kind = ErrorKind.NOT_SUPPORTED


async def check_image(
    filename: str, image_format: str | None, repair: Repair | None
) -> tuple[CheckReport, str]:
    """Check an image and repair what is asked for; with the report the format it is of.

    Raises:   Unchecked: see there. RequestError, ImageError, StorageError: it could not be checked.
    """
    async with opened_file(filename, image_format, read_only=repair is None) as (file, found_format):
        entry = format_entry(found_format)
        if entry.check is None:
            raise Unchecked("This image format does not support checks")
        if repair is None:
            return await entry.check(file), found_format
        if entry.repair is None:
            raise RequestError(
                f"Images of the format '{found_format}' cannot be repaired", kind=ErrorKind.NOT_SUPPORTED
            )
        return await entry.repair(file, repair), found_format


def status_of(report: CheckReport) -> int:
    """The exit status that tells the verdict."""
    if report.corruptions:
        return CORRUPT_STATUS
    return LEAKS_STATUS if report.leaks else 0


def report_lines(report: CheckReport) -> Iterator[str]:
    """Say what was found and repaired, and what is left."""
    for finding in report.findings:
        yield f"{'Leak' if finding.is_leak else 'ERROR'}: {finding}"
    if report.leaks_fixed or report.corruptions_fixed:
        yield "The following inconsistencies were found and repaired:"
        yield ""
        yield f"    {report.leaks_fixed} leaked clusters"
        yield f"    {report.corruptions_fixed} corruptions"
        yield ""
    if not report.corruptions and not report.leaks:
        yield "No errors were found on the image."
    if report.corruptions:
        yield ""
        yield f"{report.corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if report.leaks:
        yield ""
        yield f"{report.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if report.refusal is not None:
        yield ""
        yield f"Not repaired: {report.refusal}"
    yield from _size_lines(report)


def _size_lines(report: CheckReport) -> Iterator[str]:
    total, allocated = report.total_clusters, report.allocated_clusters
    if total and allocated:
        yield (
            f"{allocated}/{total} = {allocated / total:.2%} allocated, "
            f"{report.fragmented_clusters / allocated:.2%} fragmented, "
            f"{report.compressed_clusters / allocated:.2%} compressed clusters"
        )
    if report.image_end_offset:
        yield f"Image end offset: {report.image_end_offset}"


_COUNTS = (
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "corruptions",
    "leaks",
    "corruptions-fixed",
    "leaks-fixed",
)


def report_object(report: CheckReport, image_format: str) -> dict[str, object]:
    """QEMU's ImageCheck, in which zeroes are left out; and `findings`, which is our own."""
    counts = {name: getattr(report, name.replace("-", "_")) for name in _COUNTS}
    found: dict[str, object] = {"filename": report.filename, "format": image_format, "check-errors": 0}
    found.update({name: count for name, count in counts.items() if count})
    if report.findings:
        found["findings"] = [str(finding) for finding in report.findings]
    return found

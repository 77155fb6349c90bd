"""What a check finds in a qcow2 image, and whether a repair could mend it without losing data."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockd.formats.check_report import CheckReport


class Findings:
    """Takes what is found into a report; remembers what stands in the way of a repair."""

    def __init__(self, report: "CheckReport") -> None:
        self.report = report
        # The first thing that no repair can mend.
        self.obstacle: str | None = None
        self.obstacle_count = 0

    def leak(self, offset: int, message: str) -> None:
        """A cluster is said to be in use, or more in use than it is."""
        self.report.add_leak(offset, message)

    def mendable(self, table: str, offset: int, message: str) -> None:
        """Something is wrong that follows from the maps, and can be made from them."""
        self.report.add_corruption(table, offset, message)

    def wrong(self, table: str, offset: int, message: str) -> None:
        """Something is wrong, and nothing in the image says what would be right."""
        self.report.add_corruption(table, offset, message)
        self.obstruct(table, offset, message)

    def obstruct(self, table: str, offset: int, message: str) -> None:
        """No repair can mend this; it is told among the findings as something else."""
        self.obstacle = self.obstacle or f"{table} at {offset:#x}: {message}"
        self.obstacle_count += 1

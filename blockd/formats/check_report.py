"""What checking an image finds, whatever its format: the verdict that `blockctl image check` tells.

The numbers mean what `qemu-img check` means by them:

    leak          space that nothing refers to: it is lost, nothing else
    corruption    data is wrong already, or will be when the image is written
"""

import enum
from dataclasses import dataclass, field

# Findings past this are counted but not described.
FINDING_COUNT_MAX = 1000


class Repair(enum.Enum):
    """What a repair may change, in qemu-img's words."""

    LEAKS = "leaks"  # give back what nothing refers to
    ALL = "all"  # also make tables right that are wrong


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which table, and where in the image file the wrong value stands."""

    is_leak: bool
    table: str
    offset: int
    message: str

    def __str__(self) -> str:
        return f"{self.table} at {self.offset:#x}: {self.message}"


@dataclass
class CheckReport:
    """The verdict; counts are in clusters, with the same meaning as in `qemu-img check`.

    After a repair `leaks` and `corruptions` tell what is left, and `*_fixed` what is no more.
    """

    filename: str
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0
    leaks: int = 0
    corruptions: int = 0
    leaks_fixed: int = 0
    corruptions_fixed: int = 0
    is_dirty: bool = False
    is_marked_corrupt: bool = False
    # Why a repair has changed nothing, although there was something to repair.
    refusal: str | None = None
    findings: list[Finding] = field(default_factory=list)

    def add_leak(self, offset: int, message: str) -> None:
        self.leaks += 1
        self._add(Finding(True, "refcounts", offset, message))

    def add_corruption(self, table: str, offset: int, message: str) -> None:
        self.corruptions += 1
        self._add(Finding(False, table, offset, message))

    def _add(self, finding: Finding) -> None:
        if len(self.findings) < FINDING_COUNT_MAX:
            self.findings.append(finding)

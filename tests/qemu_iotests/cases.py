"""What of QEMU's tests is run, and what is left out, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field

COMMIT = "needs block-commit"
MIRROR = "needs drive-mirror"
BACKUP = "needs drive-backup"
QUORUM = "needs quorum"
BREAKPOINTS = "needs `break` of the human monitor's qemu-io, to hold a drive"
IOTHREADS = "is about iothreads"
GUEST = "is about who may write beside a guest's device"
ENCRYPTION = "needs encryption"


@dataclass(frozen=True)
class UnitTests:
    """A test that consists of cases, and names each."""

    name: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    format: str = "qcow2"
    protocol: str = "file"


@dataclass(frozen=True)
class Script:
    """A test whose output is compared, in sections that begin with a line `=== Title ===`."""

    name: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    # Commands at the top of a shell script that are not executed: patterns of the shell's, and why.
    passed_over: Mapping[str, str] = field(default_factory=dict)
    # Lines of either output that are not compared: a pattern, and why.
    not_compared: Mapping[str, str] = field(default_factory=dict)


UNIT_TESTS = [
    UnitTests(
        "030",
        {
            "TestSingleDrive.test_stream_pause": BREAKPOINTS,
            "TestParallelOps.test_overlapping_1": COMMIT,
            "TestParallelOps.test_overlapping_2": COMMIT,
            "TestParallelOps.test_overlapping_3": COMMIT,
            "TestParallelOps.test_overlapping_4": COMMIT,
            "TestParallelOps.test_overlapping_5": COMMIT,
            "TestParallelOps.test_stream_commit_1": COMMIT,
            "TestParallelOps.test_stream_commit_2": COMMIT,
            "TestQuorum.test_stream_quorum": QUORUM,
            "TestStreamStop.test_stream_stop": BREAKPOINTS,
            "TestSetSpeed.test_set_speed": BREAKPOINTS,
            "TestSetSpeed.test_set_speed_invalid": BREAKPOINTS,
        },
    ),
    UnitTests(
        "245",
        {
            "TestBlockdevReopen.test_incorrect_parameters_single_file": "blockd tells where a wrong type is",
            "TestBlockdevReopen.test_reopen": "needs cache.direct",
            "TestBlockdevReopen.test_reopen_raw": "needs offsets of raw nodes that change",
            "TestBlockdevReopen.test_reset_default_values": "needs x-check-cache-dropped",
            "TestBlockdevReopen.test_io_with_graph_changes": "of two overlays, blockd names the other one",
            "TestBlockdevReopen.test_graph_cycles": "needs blkverify",
            "TestBlockdevReopen.test_insert_compress_filter": "needs the compress filter",
            "TestBlockdevReopen.test_backing_reference": "needs detect-zeroes",
            "TestBlockdevReopen.test_block_stream_4": "blockd names another option that cannot be changed",
            "TestBlockdevReopen.test_block_commit_1": COMMIT,
            "TestBlockdevReopen.test_block_commit_2": COMMIT,
            "TestBlockdevReopen.test_misc_drivers": QUORUM,
            "TestBlockdevReopen.test_iothreads_error": IOTHREADS,
            "TestBlockdevReopen.test_iothreads_compatible_users": IOTHREADS,
            "TestBlockdevReopen.test_iothreads_switch_backing": IOTHREADS,
            "TestBlockdevReopen.test_iothreads_switch_overlay": IOTHREADS,
            "TestBlockdevReopen.test_iothreads_with_throttling": IOTHREADS,
        },
    ),
    UnitTests("205", format="raw", protocol="nbd"),
    UnitTests("tests/stream-error-on-reset"),
    UnitTests("tests/stream-under-throttle"),
]

SCRIPTS = [
    Script(
        "085",
        not_compared={
            r"Formatting 'TEST_DIR/\d+-snapshot-v\d\.qcow2'": "printed by QEMU's own code for images"
        },
    ),
    Script(
        "087",
        left_out={
            "Duplicate ID": "needs null-co",
            "aio=native without O_DIRECT": "needs aio=native",
            "Encrypted image QCow": ENCRYPTION,
            "Encrypted image LUKS": ENCRYPTION,
        },
        # It makes an image, and fails where the clock of used CPU time is coarse.
        passed_over={"_require_working_luks": ENCRYPTION},
    ),
    Script(
        "141",
        left_out={
            "Testing drive-backup": BACKUP,
            "Testing drive-mirror": MIRROR,
            "Testing active block-commit": COMMIT,
            "Testing non-active block-commit": COMMIT,
        },
        passed_over={
            "test_blockjob*drive-backup*": BACKUP,
            "test_blockjob*drive-mirror*": MIRROR,
            "test_blockjob*block-commit*": COMMIT,
        },
        not_compared={
            r'.*"event": "BLOCK_JOB_CANCELLED"': "a slow stream copies less at once, so it is elsewhere",
            r'\{"return": \{\}\}': "comes after the events of a job that waits, as from qemu-storage-daemon",
        },
    ),
    Script("143"),
    Script(
        "307",
        left_out={
            "Add export with conflicting iothread": IOTHREADS,
            "Add a writable export": GUEST,
        },
    ),
    Script(
        "tests/qsd-jobs",
        left_out={
            "Job still present at shutdown": COMMIT,
            "Streaming can't get permission on base node": "needs a backing file that is exported writable",
        },
    ),
]

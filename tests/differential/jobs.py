"""Scenarios of jobs: block-stream with all that can be wrong, its events, queries, and every verb."""

from tests.differential.nodes import FLAT, chain_nodes, image_node, raw_node
from tests.differential.pair import FOLDER, Scenario, Send, Step, UnderWay, call, wait

# So slow that a stream stands where its first piece leaves it.
SLOW = 1
BLOCK_JOBS, JOBS = call("query-block-jobs"), call("query-jobs")
BOTH = [BLOCK_JOBS, JOBS]
# How the verbs of both families are asked for.
JOB_VERBS = ["pause", "resume", "complete", "finalize", "dismiss", "cancel"]
OWN_PARAMETER = ("finalize", "dismiss")


def stream(job_id: str, device: str, **more: object) -> Send:
    return call("block-stream", job_id=job_id, device=device, **more)


def slow_stream(job_id: str, device: str, **more: object) -> list[Step]:
    """A stream that has done its first piece and waits for its rate."""
    return [stream(job_id, device, speed=SLOW, **more), UnderWay(job_id)]


def status(value: str, job_id: str = "j") -> Step:
    return wait("JOB_STATUS_CHANGE", status=value, id=job_id)


def block_job(verb: str, job_id: str = "j", **more: object) -> Send:
    parameter = "id" if verb in OWN_PARAMETER else "device"
    return call(f"block-job-{verb}", **{parameter: job_id}, **more)


def job(verb: str, job_id: str = "j") -> Send:
    return call(f"job-{verb}", id=job_id)


def every_verb() -> list[Step]:
    """Every verb that does not end the job of a stream that is running or over."""
    return [block_job("complete"), job("complete"), block_job("finalize"), job("finalize")]


ARGUMENTS = Scenario(
    "arguments of job commands",
    [
        call("block-stream"),
        call("block-stream", device=1),
        call("block-stream", device="x", speed="1"),
        call("block-stream", device="x", speed=1.5),
        call("block-stream", device="x", on_error="zap"),
        call("block-stream", device="x", on_error=1),
        call("block-stream", device="x", auto_finalize="on"),
        call("block-stream", device="x", auto_dismiss=0),
        call("block-stream", device="x", backing_file=1),
        call("block-stream", device="x", bogus=1),
        *(call(f"block-job-{verb}") for verb in JOB_VERBS),
        *(call(f"job-{verb}") for verb in JOB_VERBS),
        *(call(f"job-{verb}", id=1) for verb in JOB_VERBS),
        call("block-job-set-speed", device="j"),
        call("block-job-cancel", device="j", force="yes"),
        *(block_job(verb) for verb in JOB_VERBS),
        *(job(verb) for verb in JOB_VERBS),
        call("block-job-set-speed", device="j", speed=-1),
        call("block-job-set-speed", device="", speed=0),
    ],
)

REFUSALS = Scenario(
    "streams that are refused",
    [
        *chain_nodes(),
        image_node("alone", "alone.qcow2"),
        raw_node("raw", "disk.raw"),
        call("block-stream", device="none"),
        call("block-stream", device=""),
        call("block-stream", device="top"),
        stream("", "top"),
        stream("x y", "top"),
        stream("9", "top"),
        stream("j", "top", base="none"),
        stream("j", "top", base=""),
        stream("j", "top", base_node="none"),
        stream("j", "top", base_node="top"),
        stream("j", "top", base_node="alone"),
        stream("j", "mid", base_node="top"),
        stream("j", "top", bottom="none"),
        stream("j", "top", bottom="alone"),
        stream("j", "mid", bottom="top"),
        stream("j", "top", base="x", base_node="y"),
        stream("j", "top", base="x", bottom="y"),
        stream("j", "top", base_node="x", bottom="y"),
        stream("j", "top", base="x", base_node="y", bottom="z"),
        stream("j", "top", backing_file="x"),
        stream("j", "top", speed=-1),
        stream("j", "top", on_error="stop", base="none"),
        stream("j", "top", filter_node_name="9bad"),
        stream("j", "top", filter_node_name="mid"),
        stream("j", "base"),
        stream("j", "raw"),
        *BOTH,
    ],
)

SUCCESS = Scenario(
    "a stream of the whole chain",
    [*chain_nodes(), stream("j", "top"), status("null"), *BOTH, FLAT],
)

NOTHING_TO_DO = Scenario(
    "streams without anything to do",
    [
        image_node("alone", "alone.qcow2"),
        stream("j", "alone"),
        *BOTH,
        image_node("base", "base.qcow2", read_only=True),
        image_node("over", "over.qcow2", backing="base"),
        stream("j", "over", base_node="base"),
        *BOTH,
        stream("j", "over", base_node="base", auto_dismiss=False),
        *BOTH,
        job("dismiss"),
        *BOTH,
    ],
)

BASES: list[Scenario] = [
    Scenario(
        f"a stream down to {name}",
        [*chain_nodes(), stream("j", "top", **end), status("null"), FLAT],
    )
    for name, end in {
        "a base node": {"base_node": "base"},
        "a base file": {"base": f"{FOLDER}/base.qcow2"},
        "the next node": {"base_node": "mid"},
        "a bottom": {"bottom": "mid"},
        "the lowest bottom": {"bottom": "base"},
        "itself as bottom": {"bottom": "top"},
        "a base under another name": {"base_node": "base", "backing_file": "./base.qcow2"},
    }.items()
]

LARGER = Scenario(
    "a stream into a larger image",
    [
        image_node("base", "base.qcow2", read_only=True),
        image_node("larger", "larger.qcow2", backing="base"),
        stream("j", "larger"),
        status("null"),
        *BOTH,
    ],
)

CANCEL: list[Scenario] = [
    Scenario(
        f"cancelling with {name}",
        [*chain_nodes(), *slow_stream("j", "top"), cancel, status("null"), *BOTH, cancel],
    )
    for name, cancel in {
        "block-job-cancel": block_job("cancel"),
        "block-job-cancel and force": block_job("cancel", force=True),
        "job-cancel": job("cancel"),
    }.items()
]

PAUSE = Scenario(
    "pausing and resuming",
    [
        *chain_nodes(),
        *slow_stream("j", "top"),
        job("resume"),
        block_job("resume"),
        job("pause"),
        status("paused"),
        JOBS,
        job("pause"),
        block_job("pause"),
        *every_verb(),
        block_job("cancel"),
        call("block-job-set-speed", device="j", speed=-5),
        call("block-job-set-speed", device="j", speed=0),
        block_job("resume"),
        status("null"),
        *BOTH,
    ],
)

CANCEL_PAUSED: list[Scenario] = [
    Scenario(
        f"cancelling a paused job with {name}",
        [
            *chain_nodes(),
            *slow_stream("j", "top"),
            block_job("pause"),
            status("paused"),
            cancel,
            status("null"),
            *BOTH,
        ],
    )
    for name, cancel in {
        "block-job-cancel": block_job("cancel", force=True),
        "job-cancel": job("cancel"),
    }.items()
]

RUNNING = Scenario(
    "verbs while it runs",
    [
        *chain_nodes(),
        *slow_stream("j", "top"),
        JOBS,
        *every_verb(),
        job("dismiss"),
        block_job("dismiss"),
        stream("j", "mid"),
        stream("other", "top"),
        stream("other", "mid"),
        call("blockdev-del", node_name="top"),
        call("blockdev-del", node_name="mid"),
        call("block_resize", node_name="top", size=8 << 20),
        call("block-job-set-speed", device="j", speed=0),
        status("null"),
        JOBS,
    ],
)

BY_HAND = Scenario(
    "finalizing and dismissing by hand",
    [
        *chain_nodes(),
        stream("j", "top", auto_finalize=False, auto_dismiss=False),
        wait("BLOCK_JOB_PENDING", id="j"),
        *BOTH,
        job("pause"),
        job("resume"),
        job("complete"),
        job("dismiss"),
        call("block-job-set-speed", device="j", speed=5),
        job("finalize"),
        status("concluded"),
        *BOTH,
        job("pause"),
        job("cancel"),
        block_job("cancel"),
        job("finalize"),
        stream("j", "top"),
        call("block-job-set-speed", device="j", speed=5),
        block_job("dismiss"),
        *BOTH,
        job("dismiss"),
    ],
)

CANCEL_PENDING = Scenario(
    "cancelling a pending job",
    [
        *chain_nodes(),
        stream("j", "top", auto_finalize=False),
        wait("BLOCK_JOB_PENDING", id="j"),
        job("cancel"),
        status("null"),
        *BOTH,
    ],
)

CANCEL_KEPT = Scenario(
    "a cancelled job that is kept",
    [
        *chain_nodes(),
        *slow_stream("j", "top", auto_dismiss=False),
        job("cancel"),
        status("concluded"),
        *BOTH,
        job("cancel"),
        job("dismiss"),
        JOBS,
    ],
)

INTERMEDIATE = Scenario(
    "a stream into an intermediate node",
    [*chain_nodes(), stream("j", "mid"), status("null"), FLAT],
)

PARALLEL = Scenario(
    "two streams in one chain",
    [
        *chain_nodes(),
        image_node("deep", "deep.qcow2", backing="top"),
        stream("upper", "deep", base_node="mid", auto_finalize=False),
        wait("BLOCK_JOB_PENDING", id="upper"),
        stream("lower", "mid", auto_finalize=False),
        wait("BLOCK_JOB_PENDING", id="lower"),
        *BOTH,
        job("finalize", "upper"),
        status("null", "upper"),
        *BOTH,
        job("finalize", "lower"),
        status("null", "lower"),
        FLAT,
    ],
)


# Each way to say down to where, beside a stream below, whose filter may be the backing.
ENDS: dict[str, dict[str, object]] = {
    "the whole chain": {},
    "a file": {"base": f"{FOLDER}/mid.qcow2"},
    "a node": {"base_node": "mid"},
    "a bottom": {"bottom": "top"},
    "the lower file": {"base": f"{FOLDER}/base.qcow2"},
    "the lower node": {"base_node": "base"},
    "the lower bottom": {"bottom": "mid"},
    "the filter": {"base_node": "filter"},
    "the filter as bottom": {"bottom": "filter"},
}


def pending_stream(job_id: str, device: str, **more: object) -> list[Step]:
    """A stream that has done its work and keeps its part of the chain."""
    return [stream(job_id, device, auto_finalize=False, **more), wait("BLOCK_JOB_PENDING", id=job_id)]


BESIDE: list[Scenario] = [
    *(
        Scenario(
            f"down to {name}, beside a stream below",
            [
                *chain_nodes(),
                image_node("deep", "deep.qcow2", backing="top"),
                *pending_stream("lower", "mid", filter_node_name="filter"),
                *pending_stream("j", "deep", **end),
                job("finalize"),
                status("null"),
                job("finalize", "lower"),
                status("null", "lower"),
                FLAT,
            ],
        )
        for name, end in ENDS.items()
        if name in ("a bottom", "the filter")
    ),
    Scenario(
        "what a stream below keeps",
        [
            *chain_nodes(),
            image_node("deep", "deep.qcow2", backing="top"),
            *pending_stream("lower", "mid", filter_node_name="filter"),
            *(
                stream("j", "deep", **end)
                for name, end in ENDS.items()
                if name not in ("a bottom", "the filter")
            ),
            stream("j", "mid"),
            stream("j", "filter"),
            stream("j", "base"),
            stream("j", "deep", filter_node_name="filter", base_node="mid"),
            stream("j", "deep", filter_node_name="deep", base_node="mid"),
            stream("j", "deep", backing_file="x", bottom="top"),
            stream("j", "deep", backing_file="x"),
        ],
    ),
    *(
        Scenario(
            f"{name}, beside a stream above",
            [
                *chain_nodes(),
                image_node("deep", "deep.qcow2", backing="top"),
                *pending_stream("upper", "deep", base_node="mid"),
                *pending_stream("j", "mid", **end),
                job("finalize"),
                status("null"),
                job("finalize", "upper"),
                status("null", "upper"),
                FLAT,
            ],
        )
        for name, end in {"the whole chain": {}, "down to a bottom": {"bottom": "base"}}.items()
    ),
]


def failing_stream(errno: int, policy: str, *, once: bool = True) -> list[Step]:
    """A stream from a base of which one sector cannot be read, once or ever."""
    rule = {"event": "none", "iotype": "read", "errno": errno, "sector": 2048, "once": once}
    file = {"driver": "file", "filename": f"{FOLDER}/data.raw"}
    faults = {"driver": "blkdebug", "image": file, "inject-error": [rule]}
    return [
        call("blockdev-add", driver="raw", node_name="base", file=faults, read_only=True),
        image_node("top", "upper.qcow2", backing="base"),
        stream("j", "top", on_error=policy),
    ]


EIO, ENOSPC = 5, 28
ERRORS: list[Scenario] = [
    *(
        Scenario(
            f"error {errno} with {policy}", [*failing_stream(errno, policy), status("null"), *BOTH], True
        )
        for errno, policy in [
            (EIO, "report"),
            (EIO, "ignore"),
            (EIO, "enospc"),
            (EIO, "auto"),
            (ENOSPC, "report"),
            (ENOSPC, "ignore"),
        ]
    ),
    *(
        Scenario(
            f"error {errno} with {policy}, then going on",
            [
                *failing_stream(errno, policy),
                status("paused"),
                *BOTH,
                job("pause"),
                job("resume"),
                status("null"),
                *BOTH,
            ],
            compares_progress=True,
        )
        for errno, policy in [(EIO, "stop"), (ENOSPC, "stop"), (ENOSPC, "enospc")]
    ),
    Scenario(
        "an error that stays, then cancelling",
        [
            *failing_stream(EIO, "stop", once=False),
            status("paused"),
            block_job("resume"),
            status("paused"),
            block_job("cancel"),
            BLOCK_JOBS,
            block_job("cancel", force=True),
            status("null"),
            *BOTH,
        ],
        compares_progress=True,
    ),
    Scenario(
        "a failed job that is kept",
        [
            *failing_stream(EIO, "report")[:-1],
            stream("j", "top", auto_dismiss=False),
            status("concluded"),
            *BOTH,
            job("dismiss"),
            *BOTH,
        ],
        compares_progress=True,
    ),
]

QUIT = Scenario("quit with a running job", [*chain_nodes(), *slow_stream("j", "top"), call("quit"), JOBS])

SCENARIOS = [
    *(ARGUMENTS, REFUSALS, SUCCESS, NOTHING_TO_DO, *BASES, LARGER, *CANCEL, PAUSE, *CANCEL_PAUSED),
    *(RUNNING, BY_HAND, CANCEL_PENDING, CANCEL_KEPT, INTERMEDIATE, PARALLEL, *BESIDE, *ERRORS, QUIT),
]

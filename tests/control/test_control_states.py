"""The two tables: every transition and every verb in every state."""

from collections.abc import Callable

import pytest

from blockd.errors import RequestError
from blockd.jobs.job import Job
from blockd.jobs.states import TRANSITIONS, VERBS, JobStatus, JobVerb
from tests.control.fakes import Recorder, ScriptedJob

# QEMU's job.c, JobVerbTable, states in the order U C R P Y S W D X E N.
VERB_ROWS = {
    "cancel": "01111111000",
    "pause": "01111100000",
    "resume": "01111100000",
    "set-speed": "01111100000",
    "complete": "00001100000",
    "finalize": "00000001000",
    "dismiss": "00000000010",
}
# QEMU's JobSTT, without its self-transition of aborting, which nothing here takes.
TRANSITION_ROWS = {
    "undefined": "01000000000",
    "created": "00100000101",
    "running": "00011010100",
    "paused": "00100000000",
    "ready": "00000110100",
    "standby": "00001000000",
    "waiting": "00000001100",
    "pending": "00000000110",
    "aborting": "00000000010",
    "concluded": "00000000001",
    "null": "00000000000",
}
STATES = list(JobStatus)


@pytest.mark.parametrize("verb", list(JobVerb))
@pytest.mark.parametrize("status", STATES)
def test_verb_table(verb: JobVerb, status: JobStatus) -> None:
    assert (status in VERBS[verb]) == (VERB_ROWS[verb][STATES.index(status)] == "1")


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_transition_table(before: JobStatus, after: JobStatus) -> None:
    assert (after in TRANSITIONS[before]) == (TRANSITION_ROWS[before][STATES.index(after)] == "1")


async def ask(job: Job, verb: JobVerb) -> None:
    match verb:
        case JobVerb.CANCEL:
            job.cancel()
        case JobVerb.PAUSE:
            job.pause()
        case JobVerb.RESUME:
            job.is_user_paused = True  # else the sentence is the one about pauses
            job.resume()
        case JobVerb.SET_SPEED:
            job.set_speed(5)
        case JobVerb.COMPLETE:
            job.complete()
        case JobVerb.FINALIZE:
            await job.finalize()
        case JobVerb.DISMISS:
            job.dismiss()


async def tell_at_once(_job: Job, tell: Callable[[], None]) -> None:
    tell()


@pytest.mark.parametrize("verb", list(JobVerb))
@pytest.mark.parametrize("status", STATES)
async def test_refused_verbs_say_id_state_and_verb(verb: JobVerb, status: JobStatus) -> None:
    if status in VERBS[verb]:
        return
    job, recorder = ScriptedJob("job7"), Recorder()
    job.create(recorder, tell_at_once)
    job.status = status
    recorder.lines.clear()
    with pytest.raises(RequestError) as caught:
        await ask(job, verb)
    expected = f"Job 'job7' in state '{status.value}' cannot accept command verb '{verb.value}'"
    assert caught.value.message == expected
    assert (job.status, job.is_cancelled, recorder.lines) == (status, False, [])


def test_an_impossible_transition_is_our_own_mistake() -> None:
    job = ScriptedJob()
    with pytest.raises(AssertionError, match="undefined → running"):
        job.begin()

"""A batch script runs this program when its ranks are gone: `python -m outlast.epilogue RUN_DIR --exit-code N`.

The ranks requeue their job themselves when they can. This program handles the rest: an attempt whose ranks crashed or
were killed, one that could not be requeued, one that was signalled before its ranks could agree. Its exit code is the
job's. It starts in a fraction of a second, imports nothing heavy, and does nothing that was done before.
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from . import notification
from .config.configuration import load
from .config.preemption import PreemptionSection
from .errors import Exit, OutlastError, RunBusyError, SlurmError
from .files import write_atomically
from .preemption.outcome import Outcome
from .preemption.policy import describe
from .processes import SIGNALS
from .rundir.attempts import Attempt, attempt_of, attempts, finished
from .rundir.cancelled import cancelled_after
from .rundir.directory import RunDirectory
from .rundir.job_log import last_words, own_log
from .rundir.ledger import KILLED, AttemptNumber, Event, Ledger, Recorder
from .rundir.lock import RunLock
from .rundir.place import place_of
from .rundir.submission import Submission, new_token, submission_lock
from .slurm.actions import requeue_job
from .slurm.environment import SlurmJob, current_job, slurm_conf
from .slurm.submit import submit_recorded
from .slurm.view import JobView, ran_out_of_memory, show_job
from .which_run import run_named_by, target_arguments

SCRIPT = "job.sbatch"
"""The batch script as it was submitted, in the run directory."""
LAST_LINES = 30
SILENCE_S = 1800.0
WAIT_S = 20.0
"""How long ranks of this job, on other nodes, may take to be gone after `srun` has returned."""


def follow_up(run: RunDirectory, code: int, before: str | None = None) -> int:
    """Decide what follows, and do it.

    Args:
        code: `srun`'s exit code.
        before: why the batch script has not come to `srun`.

    Returns:
        The exit code for the batch script.

    Raises:
        OutlastError: the run's configuration can't be read.
    """
    job = current_job()
    # A user's own script leaves no configuration: then the defaults hold.
    limits = load(run.config).preemption if run.config.is_file() else PreemptionSection()
    if job is None or not run.path.is_dir():  # without a directory no attempt has begun
        return code
    if finished(Ledger(run.ledger).read()):
        # What a script does after training, another run included, may have failed, or be about to be done again.
        return Exit.DONE if run.config.is_file() else code
    lock = RunLock(run)
    try:
        lock.acquire(f"the end of job {job.job_id}", wait_s=WAIT_S)
    except RunBusyError as error:  # another attempt holds it, and writes the ledger
        _say(str(error))
        return _wait_in_the_queue(run, job, limits, code or Exit.FAILED)
    try:
        if finished(Ledger(run.ledger).read()):  # meanwhile, by another job
            return Exit.DONE if run.config.is_file() else code
        return _end_attempt(run, job, limits, code, before)
    finally:
        lock.release()


def tell_end(run: RunDirectory) -> None:
    """Tell how the run ended, if this job has ended it. While it goes on Slurm waits for this process: not then."""
    job, events = current_job(), Ledger(run.ledger).read()
    number = attempt_of(events, (job.job_id, job.restart_count)) if job else 0
    notification.tell_end(run, events, number, _say)


def _wait_in_the_queue(run: RunDirectory, job: SlurmJob, limits: PreemptionSection, code: int) -> int:
    """Have a job start again that found its run in use, `preemption.max_crashes` times in a row.

    Whoever uses the run will leave, or finish it. The ledger is theirs.
    """
    begun = [e for e in Ledger(run.ledger).read() if e["event"] == "attempt_started" and e["job_id"] == job.job_id]
    starts = job.restart_count - max((int(e["restart_count"]) for e in begun), default=-1)
    if code != Exit.FAILED or not 0 < starts <= limits.max_crashes:
        return code
    try:
        now = show_job(job.job_id)
        if now.is_cancelled(job) or (now.start_time is not None and cancelled_after(run.path, now.start_time)):
            return Exit.RESUME_ME
        _start_next(run, job, limits)
    except SlurmError as error:
        _say(f"it could not be started again: {error}. The same command again resumes.")
    return Exit.RESUME_ME


def _end_attempt(run: RunDirectory, job: SlurmJob, limits: PreemptionSection, code: int, before: str | None) -> int:
    ledger = Ledger(run.ledger)
    events = ledger.read()
    number = attempt_of(events, (job.job_id, job.restart_count))
    attempt = next((a for a in attempts(events) if a.number == number), Attempt(number))
    the_attempt = AttemptNumber(number)
    outcome = Outcome(run, the_attempt, limits, Recorder(ledger, the_attempt, _say), _say)
    if attempt.requeued is not None:
        return Exit.RESUME_ME
    if events and events[-1]["event"] == "gave_up":
        _show_end(run, number)
        return Exit.GAVE_UP
    view = _ask(job)
    if attempt.ended is None:
        outcome.ended(**_end(run, job, view, attempt, code, limits.lead_s, before))
        attempt = next(a for a in attempts(ledger.read()) if a.number == number)
    assert attempt.ended is not None
    _say(f"attempt {number} ended: {describe(attempt.ended)}")
    try:
        decision = outcome.follow(
            attempt.ended["cause"],
            lambda: _start_next(run, job, limits),
            is_cancelled=lambda: _is_cancelled(run, job, attempt, view),
        )
    except SlurmError as error:
        _say(f"it could not be started again: {error}. The same command again resumes.")
        return Exit.RESUME_ME
    if decision.action == "fail":
        _say(f"failed: {decision.reason}")
    if decision.action in ("give_up", "fail"):
        _show_end(run, number)
    refused = decision.action == "fail" and attempt.ended.get("refused") and code == Exit.REFUSED
    return Exit.REFUSED if refused else decision.exit_code


def _ask(job: SlurmJob) -> JobView | None:
    """Ask Slurm about the job; None if it does not answer for half an hour.

    Waiting costs nothing: while its controller is away, nobody else can have the nodes either.
    """
    deadline, said = time.monotonic() + SILENCE_S, False
    while True:
        try:
            return show_job(job.job_id)
        except SlurmError as error:
            if time.monotonic() > deadline:
                return None
            if not said:
                _say(f"{error}; waiting for Slurm to answer")
            said = True
            time.sleep(5.0)


def _is_cancelled(run: RunDirectory, job: SlurmJob, attempt: Attempt, before: JobView | None) -> bool:
    """Whether the job was cancelled since Slurm was asked, or since a rank has written how the attempt ended."""
    try:
        now = show_job(job.job_id)
    except SlurmError:
        return False  # neither will it requeue the job
    began = attempt.started["time"] if attempt.started else now.start_time
    return now.is_cancelled(job, before) or (began is not None and cancelled_after(run.path, began))


def _end(
    run: RunDirectory,
    job: SlurmJob,
    view: JobView | None,
    attempt: Attempt,
    code: int,
    lead_s: float,
    before: str | None = None,
) -> Event:
    """Find out why an attempt ended: from what Slurm says about the job, else from the ranks' exit code."""
    began = attempt.started["time"] if attempt.started else 0.0
    if attempt.started and cancelled_after(run.path, began):
        return {"cause": "cancelled"}
    # Being near its time limit explains why a job was signalled, not why a rank died without a signal.
    cause = view.stop_cause(job, lead_s if attempt.signals else -math.inf) if view else None
    if cause is not None:
        return {"cause": cause, "detail": KILLED}
    log = None if attempt.started else own_log()
    said = (last_words(log) if log else None) or ""
    if before:
        detail = ": ".join(filter(None, (before, said)))
        return {"cause": "failed", "detail": detail, "refused": True} | ({"log": str(log)} if log else {})
    if code == 0 and attempt.signals:
        return {"cause": "preempted"}  # in start-up, by a signal that somebody sent on purpose
    if code > 128 and ran_out_of_memory(job.job_id):
        return {"cause": "out_of_memory", "detail": f"killed for using too much memory on {job.nodelist}"}
    if code > 128:
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"signal {code - 128}"
        return {"cause": "failed", "detail": f"a rank was killed by {name}"}
    end: Event = {"cause": "failed", "detail": f"the ranks ended with exit code {code}"}
    if not attempt.started:
        end["detail"] += " before the run began" + (f": {said}" if said else "")
        end |= {"log": str(log)} if log else {}
    return end | ({"refused": True} if code in (Exit.REFUSED, 126, 127) else {})


def _start_next(run: RunDirectory, job: SlurmJob, limits: PreemptionSection) -> Event:
    """Have Slurm start the next attempt: requeue this job, or where that is forbidden, submit one that waits for it.

    Raises:
        SlurmError: neither is possible.
    """
    try:
        done = requeue_job(job, limits.requeue_delay_s)
        _say(f"requeued job {job.job_id}")
        return {"job_id": job.job_id, "by": done.by, "hold_lifted": done.hold_lifted}
    except SlurmError as error:
        if not (run.path / SCRIPT).is_file():
            raise
        _say(f"{error}; a job that depends on this one is submitted instead")
    job_id = _submit_dependent(run, job)
    _say(f"submitted job {job_id}, which starts when job {job.job_id} has ended")
    return {"job_id": job_id, "by": "dependent"}


def _submit_dependent(run: RunDirectory, job: SlurmJob) -> str:
    """Submit the frozen batch script again, to start when `job` has ended; its id, with the task of an array."""
    task = job.job_id.partition("_")[2]
    flags = [f"--dependency=afterany:{job.job_id}", *([f"--array={task}"] if task else [])]
    record = run.path / "submitted.json"

    def write(entry: Submission) -> None:
        if entry.job_id is not None and task:
            log = entry.log.replace("%A", entry.job_id).replace("%a", task)
            entry = replace(entry, job_id=f"{entry.job_id}_{task}", log=log)
        write_atomically(record, json.dumps(asdict(entry)))

    with submission_lock(run.path) as lock:
        done = submit_recorded(
            Submission(
                token=new_token(),
                cluster=load(run.config).cluster.kind,
                slurm_conf=slurm_conf(),
                log=str((run.path.parent if task else run.path) / "logs" / ("%A_%a.log" if task else "%j.log")),
                place=place_of(run.path),
            ),
            run.path / SCRIPT,
            flags,
            lock,
            write,
        )
    assert done.job_id is not None
    return f"{done.job_id}_{task}" if task else done.job_id


def _show_end(run: RunDirectory, number: int) -> None:
    """Print, into the batch script's log, the end of the log of the rank that ended the attempt."""
    errors = [e for e in Ledger(run.ledger).read() if e["event"] == "attempt_ended" and e["attempt"] == number]
    log = run.log(number, next((int(e["rank"]) for e in errors if "rank" in e), 0))
    if log.is_file():
        lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        _say("\n".join([f"the end of {log}:", *(f"    {line}" for line in lines)]))


def _say(text: str) -> None:
    print(f"[outlast] {text}", flush=True)


def _command() -> int:
    for number in SIGNALS:  # Slurm ends the batch script that is being requeued, this process included
        signal.signal(number, signal.SIG_IGN)
    parser = target_arguments("outlast.epilogue")
    parser.add_argument("more", nargs="*", type=Path, metavar="RUN_DIR", help="a script's other runs, in their order")
    parser.add_argument("--exit-code", type=int, required=True, metavar="N", help="srun's")
    parser.add_argument("--before", metavar="TEXT", help="why the script has not come to srun")
    arguments = parser.parse_args()
    begun = [directory for directory in (arguments.directory, *arguments.more) if directory and directory.is_dir()]
    arguments.directory = begun[-1] if begun else arguments.directory
    try:
        run = run_named_by(arguments)
        code = follow_up(run, arguments.exit_code, arguments.before)
    except OutlastError as error:
        print(f"outlast: {error}", file=sys.stderr)
        return arguments.exit_code or error.exit_code
    try:
        tell_end(run)
    except Exception as error:  # whatever it is, the job's exit code is decided
        _say(f"nobody was told how the run ended: {type(error).__name__}: {error}")
    return code


if __name__ == "__main__":
    sys.exit(_command())

"""What Slurm says of jobs, by one `squeue` and one `sacct` for any number of them.

Each has a limit in seconds, and an answer that does not come is a value, not an error: what stands in the ledgers can
be shown all the same. Jobs are told apart by the cluster too (its `slurm.conf`): a number alone may be another's job.
"""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from outlast.errors import SlurmError
from outlast.slurm.commands import run_slurm

QUEUE_LIMIT_S = 5.0
"""By itself, `squeue` gives up on a controller that is down after 9 s, on one that hangs after 10 s."""

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
ON_NODES = ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
ACTIVE = (*WAITING, *ON_NODES, "COMPLETING")
FAILURES = ("FAILED", "OUT_OF_MEMORY", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True)
class JobKey:
    """One job, or one task of an array, of one cluster."""

    conf: str | None
    """Its cluster's `slurm.conf` (`SLURM_CONF`); None: the machine's own."""
    job_id: str
    """As Slurm's commands take it: `123`, `123_4`."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    """`PENDING`, `RUNNING`, …, as `squeue` and `sacct` spell it."""
    reason: str | None = None
    """Why it waits, or why it ended."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


@dataclass
class Answer:
    """What is known of the jobs asked for. A job that Slurm no longer has is absent."""

    jobs: dict[JobKey, JobState] = field(default_factory=dict)
    tokens: dict[tuple[str | None, str], str] = field(default_factory=dict)
    """The job, or the array, that was submitted with a token, by cluster and token (its comment, or the end of it)."""
    silent: dict[str | None, str] = field(default_factory=dict)
    """The clusters that did not answer, with the reason."""


def ask(
    wanted: Iterable[JobKey],
    users: Iterable[int],
    clusters: Iterable[str | None] = (),
    *,
    limit_s: float = QUEUE_LIMIT_S,
) -> Answer:
    """Ask each cluster once.

    Args:
        wanted: jobs to be found. `sacct` is asked for those alone that have left the queue.
        users: whose jobs (numbers, as `stat` gives them).
        clusters: further clusters to ask, for jobs that are known by their comment only.
        limit_s: how long a command may take.
    """
    by_cluster: dict[str | None, set[str]] = {conf: set() for conf in clusters}
    for key in wanted:
        by_cluster.setdefault(key.conf, set()).add(key.job_id)
    answer, owners = Answer(), ",".join(str(user) for user in sorted(users))
    for conf, ids in by_cluster.items():
        try:
            _squeue(answer, conf, owners, limit_s)
        except SlurmError as error:
            answer.silent[conf] = str(error)
            continue
        gone = {job_id for job_id in ids if JobKey(conf, job_id) not in answer.jobs}
        if gone and shutil.which("sacct"):
            _sacct(answer, conf, gone, limit_s)
    return answer


def _squeue(answer: Answer, conf: str | None, owners: str, limit_s: float) -> None:
    layout = "--format=%i|%F|%T|%r|%k"
    out = run(conf, "squeue", "--noheader", "--array", "--states=all", f"--user={owners}", layout, limit_s=limit_s)
    for line in out.splitlines():
        job_id, whole, state, reason, comment = (*line.strip().split("|", 4), *[""] * 5)[:5]
        if not state:
            continue
        answer.jobs[JobKey(conf, job_id)] = JobState(state, None if reason in ("None", "") else reason)
        if comment not in ("", "(null)"):
            answer.tokens[conf, comment.rpartition(";")[2]] = whole  # a user's own comment stands before the token


def _sacct(answer: Answer, conf: str | None, gone: set[str], limit_s: float) -> None:
    """What the accounting remembers of jobs that the queue has forgotten; nothing where there is none."""
    whole = ",".join(sorted({job_id.partition("_")[0] for job_id in gone}))
    try:
        out = run(conf, "sacct", "-nPX", f"--jobs={whole}", "--format=JobID,State", limit_s=limit_s)
    except SlurmError:
        return
    known: dict[str, str] = {}
    for line in out.splitlines():
        words, _, state = line.partition("|")
        known |= dict.fromkeys(expanded(words), (state.split() or [""])[0])  # "CANCELLED by 1000"
    arrays = {job_id.partition("_")[0] for job_id in known} if "..." not in out else set()
    for job_id in gone:
        # A task that was cancelled before it started is struck from its array, and has no entry of its own.
        state = known.get(job_id, "CANCELLED" if "_" in job_id and job_id.partition("_")[0] in arrays else "")
        if state and state not in ACTIVE:  # it may lag behind: a job that left the queue is over
            answer.jobs[JobKey(conf, job_id)] = JobState(state)


def expanded(words: str) -> list[str]:
    """The tasks of an array that `sacct` shows in one line: `12_[1-2,4]` gives `12_1`, `12_2`, `12_4`."""
    array, is_array, tasks = words.partition("_[")
    if not is_array:
        return [words]
    found = []
    for part in tasks.partition("]")[0].partition("%")[0].split(","):
        if bounds := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            numbers = range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1, int(bounds[3] or 1))
            found += [f"{array}_{number}" for number in numbers]
    return found


def cancel(conf: str | None, job_ids: Iterable[str]) -> None:
    """Cancel exactly these jobs and array tasks, in one call.

    Raises:
        SlurmError: no answer, or it refused one of them.
    """
    run(conf, "scancel", *compressed(job_ids), limit_s=30.0)


def compressed(job_ids: Iterable[str]) -> list[str]:
    """Job ids with the tasks of an array in one word, as `scancel` takes them: `12_1`, `12_2` give `12_[1-2]`."""
    single, tasks = [], defaultdict(list)
    for job_id in job_ids:
        array, is_task, task = job_id.partition("_")
        if not is_task:
            single.append(job_id)
        elif task.isdigit():
            tasks[array].append(int(task))
        else:
            raise SlurmError(f"{job_id!r} is no job id")
    words = sorted(single)
    for array, numbers in sorted(tasks.items()):
        words.append(f"{array}_[{ranges(numbers)}]")
    return words


def ranges(numbers: Iterable[int]) -> str:
    """Tasks of an array as Slurm's commands take them: `0-3,7`."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def run(conf: str | None, *command: str, limit_s: float = QUEUE_LIMIT_S) -> str:
    """The output of one of Slurm's commands, for the cluster of `conf`.

    Raises:
        SlurmError: as `slurm.run`, or `conf` is gone.
    """
    env = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    if conf is not None:
        if not os.path.exists(conf):  # the commands would try for a minute
            raise SlurmError(f"its configuration {conf} is gone")
        env["SLURM_CONF"] = conf
    return run_slurm(*command, timeout_s=limit_s, env=env)

"""Tells somebody how a run ended: by apprise, in a process of its own, within seconds, whatever becomes of it.

The URLs come from an environment variable and go nowhere but to that process. It is started when the ranks are gone, or
in training; never between a preemption's signal and the exit.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

from .config.configuration import load
from .config.notify import NotifySection
from .errors import OutlastError
from .processes import python_module_command
from .rundir.attempts import attempts
from .rundir.directory import RunDirectory
from .rundir.ledger import Event
from .rundir.sweep import SWEEP_MANIFEST

LIMIT_S = 8
"""Seconds that a service may take."""
SPARE_S = 4.0
"""Seconds beyond that for starting Python and apprise, on a busy node."""
HURRY_S = 5.0
"""Seconds in all after a signal. The job may be killed soon, and is to end with its own exit code."""
NOT_INSTALLED, NO_URL, NOT_TAKEN = 3, 4, 5
WORDS = {
    NOT_INSTALLED: "apprise is not installed (pip install 'outlast[notify]')",
    NO_URL: "apprise knows no such URL",
    NOT_TAKEN: "the service did not take it",
    -signal.SIGALRM: "the service did not answer in time",
}

Say = Callable[[str], None]


def end_of(events: list[Event], number: int) -> tuple[str, str] | None:
    """Kind and words of how attempt `number` ended the run; None if it goes on, or was stopped."""
    own = {event["event"]: event for event in events if event["attempt"] == number}
    starts = sum(attempt.started is not None for attempt in attempts(events))
    if "finished" in own:
        return "finished", f"at step {own['finished']['step']}, in {starts} attempt{'s' if starts != 1 else ''}"
    gave_up = own.get("gave_up") or next((e for e in events[-1:] if e["event"] == "gave_up"), None)
    if gave_up is not None:
        return "gave_up", str(gave_up["reason"])
    ended = own.get("attempt_ended", {"cause": None})
    if "requeued" in own or ended["cause"] not in ("failed", "out_of_memory"):
        return None
    return "failed", str(ended.get("error") or ended.get("detail") or ended["cause"]).partition("\n")[0]


def tell_end(run: RunDirectory, events: list[Event], number: int, say: Say) -> None:
    """Tell how attempt `number` ended the run, if it did; see :func:`tell`."""
    if (end := end_of(events, number)) is not None:
        signalled = any(event["event"] == "signal" and event["attempt"] == number for event in events)
        tell(run, *end, say, within_s=HURRY_S if signalled else LIMIT_S + SPARE_S)


def tell(run: RunDirectory, kind: str, text: str, say: Say, *, within_s: float = LIMIT_S + SPARE_S) -> None:
    """Tell, if anybody is to be told of that; returns within seconds. A failure is one line in the log.

    Args:
        kind: as in `notify.when`.
        text: what happened, in a sentence.
        say: prints a line in the log.
        within_s: seconds after which it is given up.
    """
    try:
        section = load(run.config).notify if run.config.is_file() else None
        if section is None or kind not in section.when or not _is_set(section, say):
            return
        in_sweep = (run.path.parent / SWEEP_MANIFEST).is_file()
        name = f"{run.path.parent.name}/{run.path.name}" if in_sweep else run.path.name
        message = {"title": f"outlast: {name} {_words(kind)}", "body": f"{text}\n{run.path}"}
        problem = _send(section.env, message, within_s)
    except (OutlastError, OSError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        say(f"nobody was told that the run {_words(kind)}: {problem}")


def tell_meanwhile(run: RunDirectory, kind: str, text: str, say: Say) -> None:
    """Do the same in a thread, for a process that trains."""
    threading.Thread(target=tell, args=(run, kind, text, say), name="outlast-notify", daemon=True).start()


def _is_set(section: NotifySection, say: Say) -> bool:
    if os.environ.get(section.env, "").strip():
        return True
    if section.env != NotifySection().env:
        say(f"nobody is told: the environment has no {section.env} (notify.env)")
    return False


def _words(kind: str) -> str:
    return {"gave_up": "gave up", "notice_short": "has too short a notice"}.get(kind, kind)


def _send(variable: str, message: dict[str, str], within_s: float) -> str | None:
    """Have a process of its own send it; what went wrong, without a word of the URL."""
    try:
        done = subprocess.run(
            [*python_module_command("outlast.notification"), variable, str(LIMIT_S)],
            input=json.dumps(message).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=within_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {within_s:g} s"
    code = done.returncode
    return None if code == 0 else WORDS.get(code, f"its process ended with exit code {code}")


def _command() -> int:
    """Send the message on standard input to the URLs in the environment variable that is named."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a rank's threads hold signals back
    try:
        import apprise
    except ImportError:
        return NOT_INSTALLED
    signal.alarm(int(sys.argv[2]))  # also if the process that has started this one is gone
    message = json.load(sys.stdin)
    service = apprise.Apprise()
    known = service.add(os.environ[sys.argv[1]].split())
    taken = len(service) > 0 and service.notify(**message)  # those that it knows are told in any case
    return NO_URL if not known else 0 if taken else NOT_TAKEN


if __name__ == "__main__":
    sys.exit(_command())

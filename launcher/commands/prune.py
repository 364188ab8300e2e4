"""`outlast prune`: frees space by rule in runs that have ended. It shows first what would go, and asks."""

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from outlast.checkpoint.manifest import verify
from outlast.checkpoint.removal import Remover
from outlast.errors import CheckpointError, ConfigError, Exit, RunBusyError
from outlast.files import bytes_used, to_json, write_atomically
from outlast.rundir import progress
from outlast.rundir.attempts import next_attempt
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import AttemptNumber, Ledger, Recorder
from outlast.rundir.lock import RunLock
from outlast.rundir.submission import submission_lock

from ..display.progress import size
from ..runs import queue
from ..runs.find import runs_named, runs_under, unreadable_under
from ..runs.prunable import KEEPS, Item, Prunable, Rule, bytes_freed, prunable, version_of
from ..runs.standing import collect
from ..runs.submissions import sweep_at

LIMIT_S = 10.0
UNITS = {"min": 60, "h": 3600, "d": 86_400, "w": 604_800}
REASON = "prune"
"""The reason of a deletion, in the ledger."""


@dataclass
class Pruned:
    """What has gone of one run, and what went wrong."""

    items: list[Item] = field(default_factory=list)
    problem: str | None = None


def main(
    names: Sequence[str],
    root: Path,
    *,
    older: str | None,
    keep: str,
    unfinished: bool,
    dry_run: bool,
    sure: bool,
    as_json: bool,
) -> int:
    """`outlast prune [RUN|SWEEP…]`. Exit code 1 if something was left that the rule names, or that was named.

    Raises:
        ConfigError: an argument is refused, or nobody is there to be asked.
    """
    rule = rule_of(older, keep, unfinished=unfinished, named=bool(names))
    if as_json and not (dry_run or sure):
        raise ConfigError("--json", "prune", "nothing is asked then; valid: --json --dry-run, or --json --yes")
    closed = [] if names else unreadable_under(root)
    plans = look(runs_named(names, root) if names else runs_under(root), rule)
    going = [plan for plan in plans if plan.items]
    if not as_json:
        _show(plans, closed, dry_run=dry_run)
    if going and not (dry_run or sure):
        _ask(going)
    done = {str(plan.run.path): Pruned() if dry_run else prune(plan) for plan in going}
    for plan in going:
        if (problem := done[str(plan.run.path)].problem) is not None and not as_json:
            print(f"{plan.row.name}: {problem}", file=sys.stderr)
    gone = [item for one in done.values() for item in one.items]
    if as_json:
        print(to_json(_values(plans, done, gone, closed, dry_run=dry_run), indent=1))
    elif going and not dry_run:
        print(f"freed {size(bytes_freed(gone))}")
    wrong = closed or any(plan.notes or _is_wrong(plan, named=bool(names)) for plan in plans)
    return Exit.FAILED if wrong or any(one.problem for one in done.values()) else Exit.DONE


def rule_of(older: str | None, keep: str, *, unfinished: bool, named: bool) -> Rule:
    """The rule that the arguments give.

    Raises:
        ConfigError: one of them is refused.
    """
    kept = tuple(part.strip() for part in keep.split(","))
    for part in kept:
        if part not in KEEPS:
            raise ConfigError("--keep", part, KEEPS)
    if unfinished and not (named and older):
        valid = "valid with RUN and --older only: such a run can't be resumed afterwards"
        raise ConfigError("--unfinished", "prune", valid)
    time = re.fullmatch(r"(\d+(?:\.\d+)?)(min|h|d|w)", older or "0min")
    if time is None:
        raise ConfigError("--older", older, "valid: a time such as 90min, 12h, 30d or 4w")
    return Rule(keep=kept, older_s=float(time[1]) * UNITS[time[2]], unfinished=unfinished)


def look(runs: Sequence[RunDirectory], rule: Rule) -> list[Prunable]:
    """Decide what may go of each run; a run that has two names is looked at once."""
    once = list({run.path.resolve(): run for run in reversed(runs)}.values())[::-1]
    versions = {str(run.path): version_of(run) for run in once}
    rows = collect(once, ask=partial(queue.ask, limit_s=LIMIT_S))
    return [prunable(row, versions[row.path], rule) for row in rows]


def prune(plan: Prunable) -> Pruned:
    """Delete what the plan names, while nobody can start or submit the run, after a look at what stays."""
    run, done = plan.run, Pruned()
    sweep = sweep_at(run.path.parent)
    try:
        with ExitStack() as held:
            held.enter_context(submission_lock(sweep.path if sweep else run.path))
            lock = RunLock(run)
            lock.acquire("outlast prune")
            held.callback(lock.release)
            if version_of(run) != plan.version:
                done.problem = "it has started, or was submitted, meanwhile: nothing was deleted"
            elif damage := _damage(plan.kept):
                done.problem = f"{damage}. That is to stay, so nothing was deleted"
            else:
                _delete(plan, done)
    except RunBusyError as error:
        done.problem = str(error)
    except OSError as error:
        done.problem = f"{error.filename}: {error.strerror}"
    return done


def _damage(kept: list[Path]) -> str | None:
    """What is wrong with a checkpoint that stays; None if all are whole."""
    for path in kept:
        try:
            verify(path)
        except CheckpointError as error:
            return f"{path.name} does not verify: {error}"
    return None


def _delete(plan: Prunable, done: Pruned) -> None:
    run = plan.run
    ledger = Ledger(run.ledger)
    say = partial(print, f"{plan.row.name}:", file=sys.stderr)
    record = Recorder(ledger, AttemptNumber(max(next_attempt(ledger.read()) - 1, 1)), say)
    remover = Remover(run, record, say)
    for item in plan.items:
        if item.sealed is not None:
            gone = remover.delete(item.sealed, REASON)
        elif item.path.parent == run.checkpoints and item.path not in (run.staging, run.trash):
            remover.recover()  # it was half-deleted
            gone = not item.path.exists()
        elif gone := remover.remove_tree(item.path):
            record("deleted", checkpoint=item.name, reason=REASON)
        if gone:
            done.items.append(item)
    if len(done.items) < len(plan.items):
        done.problem = "not all could be deleted; the ledger says why"
    if (now := progress.read(run)) is not None:  # what `outlast status` shows
        now = replace(now, bytes_used=bytes_used(run.path, skip_unreadable=True))
        write_atomically(run.progress, to_json(asdict(now)), durable=False)


def _is_wrong(plan: Prunable, *, named: bool) -> bool:
    """Whether leaving the run alone is worth an exit code: it was named, or is somebody else's, or is not readable."""
    if plan.skipped is None:
        return False
    return named or not plan.skipped.endswith(("has not ended", "--older says"))


def _show(plans: list[Prunable], closed: list[Path], *, dry_run: bool) -> None:
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=200)
    going = [plan for plan in plans if plan.items]
    if going:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for header in ("run", "state", "frees", "goes", "stays"):
            table.add_column(header, overflow="fold")
        for plan in going:
            goes, stays = (", ".join(names) for names in (_going(plan), [path.name for path in plan.kept]))
            table.add_row(plan.row.name, plan.row.state, size(bytes_freed(plan.items)), goes, stays or "no checkpoint")
        console.print(table)
    for plan in plans:
        if plan.skipped is not None:
            print(f"left alone: {plan.row.name}: {plan.skipped}")
        for note in plan.notes:
            print(f"left: {plan.row.name}: {note}")
    for path in closed:
        print(f"left alone: {path.name}: you may not read it")
    if not going:
        print("nothing to prune")
    else:
        total = size(bytes_freed(item for plan in going for item in plan.items))
        print(f"{'would free' if dry_run else 'frees'} {total} in {len(going)} {'run' if len(going) == 1 else 'runs'}")


def _going(plan: Prunable) -> list[str]:
    steps = [str(item.sealed.step) for item in plan.items if item.sealed]
    found = [f"checkpoint{'s' if len(steps) > 1 else ''} {', '.join(steps)}"] if steps else []
    return found + [item.name for item in plan.items if not item.sealed]


def _ask(going: list[Prunable]) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("prune", f"{len(going)} runs", "nobody is there to be asked; valid: --yes, or --dry-run")
    if input("delete? [yes/no] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("prune", "no", "nothing was deleted")


def _values(
    plans: list[Prunable], done: dict[str, Pruned], gone: list[Item], closed: list[Path], *, dry_run: bool
) -> dict[str, Any]:
    """The values of `--json`. Sizes in bytes; `bytes` is what the plan frees, `freed_bytes` what has been freed."""
    runs = []
    for plan in plans:
        one = done.get(plan.row.path, Pruned())
        runs.append({
            "name": plan.row.name, "path": plan.row.path, "state": plan.row.state,
            "bytes": bytes_freed(plan.items), "freed_bytes": bytes_freed(one.items),
            "goes": [item.name for item in plan.items], "deleted": [item.name for item in one.items],
            "stays": [path.name for path in plan.kept], "notes": plan.notes, "skipped": plan.skipped,
            "problem": one.problem,
        })  # fmt: skip
    total = bytes_freed(item for plan in plans for item in plan.items)
    return {
        "dry_run": dry_run,
        "bytes": total,
        "freed_bytes": bytes_freed(gone),
        "runs": runs,
        "unreadable": [str(path) for path in closed],
    }

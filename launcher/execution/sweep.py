"""`outlast train -m`: the cells of a sweep, planned and checked one by one, submitted as one job array.

    runs/<sweep>/sweep.json      what was asked for, cell by cell, and every submission
    runs/<sweep>/<cell>/         a run directory like any other

The same command again finds the sweep by its name, adds cells that are new, and submits what is neither done nor in
the queue.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from outlast.config.configuration import Config
from outlast.config.sections import RunSection, SlurmCluster
from outlast.errors import ConfigError, Exit, OutlastError
from outlast.rundir import submission
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.submission import Submission
from outlast.rundir.sweep import MANIFEST, Cell, Manifest, read_manifest
from outlast.storage.budget import GB, round_up

from ..planning import plan as planning
from ..planning.batch_script import Target, batch_script, use_cluster
from ..planning.compose import Composer
from ..planning.expand import Combination, expand
from ..planning.plan import Plan
from ..planning.storage import CODE_BYTES
from ..runs.runs import State, is_locked, state_of
from ..runs.submissions import mark_cancelled
from . import arrays
from .submit import in_queue, take_code

Standing = Literal["open", "queued", "finished", "failed", "cancelled", "gave_up"]
"""What the same command again does about a cell: submits it if it is `open`, else leaves it alone."""

ENDED: tuple[Standing, ...] = ("failed", "cancelled", "gave_up")
SHOWN = 10
"""Names of cells in a message, at most."""
WRITERS = 16
"""Threads that write cells' directories: they wait for the disk, most of all on a shared file system."""


class CellsRefusedError(OutlastError):
    """Cells of a sweep are refused; the message has them all."""

    exit_code = Exit.REFUSED


@dataclass(frozen=True)
class PlannedCell:
    """One cell, checked."""

    combination: Combination
    plan: Plan

    @property
    def name(self) -> str:
        return self.combination.name


@dataclass(frozen=True)
class SweepPlan:
    """A whole sweep, checked: nothing of it has been written."""

    name: str
    root: Path
    overrides: list[str]
    """As typed."""
    cells: list[PlannedCell]

    @property
    def directory(self) -> Path:
        return self.root / self.name

    @property
    def kind(self) -> str:
        """Of the cluster, the same for all cells."""
        return self.cells[0].plan.config.cluster.kind

    @property
    def hazards(self) -> list[str]:
        """Those of all cells, each once."""
        return list(dict.fromkeys(hazard for cell in self.cells for hazard in cell.plan.hazards))

    def script(self) -> str | None:
        """The batch script of the first cell's array, as `outlast plan` shows it; None for `cluster=local`."""
        config = self.cells[0].plan.config
        return batch_script(config, self.target()) if isinstance(config.cluster, SlurmCluster) else None

    def target(self, *, code: str = "code", offset: int = 0) -> Target:
        return Target(name=self.name, directory=self.directory, code=self.directory / code, sweep=True, offset=offset)


@dataclass
class Outcome:
    """What a submission did: names of cells."""

    submitted: list[str] = field(default_factory=list)
    standing: dict[str, Standing] = field(default_factory=dict)
    """Of every cell, before."""
    jobs: list[Submission] = field(default_factory=list)
    """What was submitted now."""

    def count(self, standing: Standing) -> int:
        return sum(one == standing for one in self.standing.values())


def make(overrides: Sequence[str], *, config_dir: Path | None = None) -> SweepPlan:
    """Expand, compose and check every cell.

    Raises:
        ConfigError: the sweep as a whole is refused.
        CellsRefusedError: some of its cells are; the message names each.
    """
    composer = Composer(config_dir)
    shared, combinations = expand(overrides, composer)
    refused: dict[str, str] = {}
    configs: dict[str, Config] = {}
    for combination in combinations:
        try:
            configs[combination.name] = composer.compose(shared, combination.overrides)
        except ConfigError as error:
            refused[combination.name] = str(error)
    if not configs:
        raise _refusal(refused, len(combinations))
    named = any(text.lstrip("+").startswith("run.name=") for text in shared)
    name, root = _name_and_root(list(configs.values()), named)
    plans: dict[str, Plan] = {}
    for combination in combinations:
        if combination.name not in configs:
            continue
        config = configs[combination.name]
        config.run = RunSection(name=combination.name, root=str(root / name))
        try:
            plans[combination.name] = planning.make(config, with_script=False)
        except ConfigError as error:
            refused[combination.name] = str(error)
    if refused:
        raise _refusal(refused, len(combinations))
    kinds = {config.cluster.kind for config in configs.values()}
    if len(kinds) > 1:
        raise ConfigError("cluster", ", ".join(sorted(kinds)), "valid: one for the whole sweep")
    cells = [PlannedCell(combination, plans[combination.name]) for combination in combinations]
    _check_budget([cell.plan for cell in cells])
    sweep = SweepPlan(name, root, list(overrides), cells)
    sweep.script()  # refuses what a batch script can't have
    check_directory(sweep)
    return sweep


def _check_budget(plans: list[Plan]) -> None:
    """See that an even share of the sweep's budget does for each cell."""
    total = plans[0].config.storage.sweep_budget_gb
    each = max(plan.storage.get("smallest_budget_gb", 0.0) for plan in plans)
    if total is not None and len(plans) * each + CODE_BYTES / GB > total:
        least = round_up(len(plans) * each + CODE_BYTES / GB)
        valid = f"valid: {least:g} or more, for {len(plans)} cells that need up to {each:g} GB each, and their code"
        raise ConfigError("storage.sweep_budget_gb", total, valid)


def _name_and_root(configs: list[Config], named: bool) -> tuple[str, Path]:
    """`run.name` is the sweep's; left out, it says what runs and has eight digits of what decides the weights."""
    first = configs[0]
    if named:
        return str(first.run.name), Path(first.run.root)
    digests = "".join(sorted(config.digest for config in configs))
    digits = hashlib.sha256(digests.encode()).hexdigest()[:8]
    return f"{first.job.name}-{first.model.kind}-{first.data.kind}-sweep-{digits}", Path(first.run.root)


def _refusal(refused: dict[str, str], count: int) -> CellsRefusedError:
    by_message: dict[str, list[str]] = defaultdict(list)
    for name, message in refused.items():
        by_message[message].append(name)
    lines = [f"  {shown(names)}: {message}" for message, names in by_message.items()]
    head = f"{len(refused)} of {count} cells are refused, so nothing was started"
    return CellsRefusedError("\n".join([f"{head}:", *lines]))


def shown(names: Sequence[str]) -> str:
    """Names for a message."""
    more = len(names) - SHOWN
    return " · ".join(names[:SHOWN]) + (f" · and {more} more" if more > 0 else "")


def check_directory(sweep: SweepPlan) -> None:
    """See that the sweep's directory is free, or holds a sweep; writes nothing.

    Raises:
        ConfigError: it holds something else.
    """
    path = sweep.directory
    for above in (path, *path.parents):
        if above.exists() and not above.is_dir():
            raise ConfigError("run.root", str(sweep.root), f"valid: a directory; {above} is none")
    if path.exists() and not (path / MANIFEST).exists():
        cells = {cell.name for cell in sweep.cells}  # made by a command that was killed, or is about to say so
        if {p.name for p in path.iterdir() if p.name[0] != "."} - cells - {"logs"}:
            raise ConfigError("run.name", sweep.name, f"{path} exists and is no sweep; choose another run.name")


def check_cells(sweep: SweepPlan) -> None:
    """See that the cells' directories are free, or hold these very cells; the caller holds the sweep's lock.

    Raises:
        CellsRefusedError: some hold other runs.
    """
    known = {cell.name: cell for cell in manifest_of(sweep).cells}
    refused = {}
    for cell in sweep.cells:
        before = known.get(cell.name)
        if before is not None and before.config_digest == cell.plan.config.digest:
            continue  # read and compared when it was first submitted
        try:
            planning.check_directory(cell.plan)
        except ConfigError as error:
            refused[cell.name] = str(error)
    if refused:
        raise _refusal(refused, len(sweep.cells))


def manifest_of(sweep: SweepPlan) -> Manifest:
    """What the directory holds already."""
    if not (sweep.directory / MANIFEST).exists():
        return Manifest(name=sweep.name)
    return read_manifest(sweep.directory)


def merged(sweep: SweepPlan) -> Manifest:
    """The manifest with the cells of `sweep`: those it had keep their indices, new ones follow."""
    manifest = manifest_of(sweep)
    manifest.overrides = sweep.overrides
    known = {cell.name: cell.index for cell in manifest.cells}
    for cell in sweep.cells:
        index = known.get(cell.name, len(manifest.cells))
        manifest.cells[index : index + 1] = [
            Cell(
                index=index,
                name=cell.name,
                directory=cell.name,
                overrides=list(cell.combination.overrides),
                config_digest=cell.plan.config.digest,
            )
        ]
    return manifest


def make_directory(sweep: SweepPlan) -> None:
    """Make the sweep's directory, for its lock.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        (sweep.directory / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run.root", str(sweep.root), f"{error.filename}: {error.strerror}") from None


def submit(sweep: SweepPlan, *, reopen: bool = False) -> Outcome:
    """Submit what is open, in one job array (in several, where it has more tasks than Slurm allows, or where cells
    differ in what they ask of Slurm).

    Args:
        reopen: submit also what failed, was cancelled or gave up.

    Raises:
        SlurmError: Slurm does not answer, or refuses. Cells whose array was accepted before that are in the queue.
    """
    use_cluster(sweep.cells[0].plan.config)
    make_directory(sweep)
    with submission.submission_lock(sweep.directory) as lock:
        check_cells(sweep)
        manifest = merged(sweep)
        outcome = Outcome(standing=_standings(sweep))
        left = ("queued", "finished") if reopen else ("queued", "finished", *ENDED)
        todo = [cell for cell in sweep.cells if outcome.standing[cell.name] not in left]
        if not todo:
            return outcome
        found = arrays.arrays_of(todo, manifest)
        _freeze(todo)
        # Cells that this command does not know of may wait, or run, with what was frozen for them.
        code = "code" if not manifest.submissions else f"code-{len(manifest.submissions) + 1}"
        take_code(todo[0].plan.config, sweep.target(code=code))
        for cells, indices, offset in found:
            done = arrays.submit(
                sweep, manifest, cells, indices, sweep.target(code=code, offset=offset), lock, len(found)
            )
            outcome.jobs.append(done)
            outcome.submitted += [cell.name for cell in cells]
    return outcome


def _standings(sweep: SweepPlan) -> dict[str, Standing]:
    runs = {cell.name: cell.plan.directory for cell in sweep.cells}
    standings = {name: standing(run) for name, run in runs.items()}
    for path, (job_id, state) in in_queue([run for name, run in runs.items() if standings[name] == "open"]).items():
        if state.active:
            standings[path.name] = "queued"
        elif state.state == "CANCELLED":  # by `scancel`, while it waited: Slurm forgets that, so it is written down
            mark_cancelled(runs[path.name], job_id)
            standings[path.name] = "cancelled"
    return standings


def standing(run: RunDirectory) -> Standing:
    """Where a cell stands, as far as its own records say.

    One that failed, was cancelled or gave up has come to its end: submitting it again is a decision, and has a
    command of its own, `outlast resume`.
    """
    state: State = state_of(run, Ledger(run.ledger).read())
    match state:
        case "finished" | "failed" | "cancelled" | "gave_up":
            return state
        case "running":
            # Held by a process of this host; or its last sign of life is fresh, and Slurm is asked.
            return "queued" if is_locked(run) else "open"
        case _:
            return "open"


def _freeze(cells: Iterable[PlannedCell]) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for _ in pool.map(lambda cell: planning.freeze(cell.plan), cells):
            pass


def prepare(sweep: SweepPlan, index: int) -> RunDirectory:
    """Make the run directory of one cell, for a batch script that is one task of a user's own array.

    Raises:
        ConfigError: there is no such cell.
    """
    if not 0 <= index < len(sweep.cells):
        count = len(sweep.cells)
        raise ConfigError("--cell", index, f"the sweep has {count} cells; valid: 0 to {count - 1} (sbatch --array)")
    make_directory(sweep)
    cell = sweep.cells[index]
    with submission.submission_lock(sweep.directory):  # the other tasks do the same at this moment
        check_cells(sweep)
        merged(sweep).write(sweep.directory)
    if cell.plan.directory.config.exists():
        planning.check_directory(cell.plan)
    else:
        planning.freeze(cell.plan)
    return cell.plan.directory

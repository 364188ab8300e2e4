"""The plan of `outlast train -m`: the cells of a sweep, planned and checked one by one.

runs/<sweep>/sweep.json      what was asked for, cell by cell, and every submission
runs/<sweep>/<cell>/         a run directory like any other
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outlast.config.cluster import SlurmCluster
from outlast.config.configuration import Config
from outlast.config.run import RunSection
from outlast.errors import ConfigError, Exit, OutlastError, ResumeRefusedError
from outlast.rundir.sweep import SWEEP_MANIFEST, Cell, SweepManifest, read_sweep_manifest
from outlast.storage.budget import GB, round_up

from .batch_script import Target, batch_script
from .compose import Composer
from .expand import Combination, expand
from .plan import Plan, check_run_directory, plan_run
from .storage import CODE_BYTES

SHOWN = 10
"""Names of cells in a message, at most."""


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
        """The kind of the cluster, which is the same for all cells."""
        return self.cells[0].plan.config.cluster.kind

    @property
    def hazards(self) -> list[str]:
        """The hazards of all cells, each once."""
        return list(dict.fromkeys(hazard for cell in self.cells for hazard in cell.plan.hazards))

    def script(self) -> str | None:
        """The batch script of the first cell's array, as `outlast plan` shows it; None for `cluster=local`."""
        config = self.cells[0].plan.config
        return batch_script(config, self.target()) if isinstance(config.cluster, SlurmCluster) else None

    def target(self, *, code: str = "code", offset: int = 0) -> Target:
        return Target(name=self.name, directory=self.directory, code=self.directory / code, sweep=True, offset=offset)


def plan_sweep(overrides: Sequence[str], *, config_dir: Path | None = None) -> SweepPlan:
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
            plans[combination.name] = plan_run(config, with_script=False)
        except (ConfigError, ResumeRefusedError) as error:
            refused[combination.name] = str(error)
    if refused:
        raise _refusal(refused, len(combinations))
    kinds = {config.cluster.kind for config in configs.values()}
    if len(kinds) > 1:
        raise ConfigError("cluster", ", ".join(sorted(kinds)), "valid: one for the whole sweep")
    cells = [PlannedCell(combination, plans[combination.name]) for combination in combinations]
    sweep = SweepPlan(name, root, list(overrides), cells)
    sweep.script()  # refuses what a batch script can't have
    check_sweep_directory(sweep)
    check_budget([cell.plan for cell in cells], merged(sweep))
    return sweep


def check_budget(plans: list[Plan], manifest: SweepManifest, *, code_bytes: int = CODE_BYTES) -> None:
    """See that an even share of the sweep's budget does for each cell, those of earlier commands included.

    Args:
        manifest: all cells that the sweep's directory will hold.
        code_bytes: what the cells share.

    Raises:
        ConfigError: it does not.
    """
    total, count = plans[0].config.storage.sweep_budget_gb, len(manifest.cells)
    if total is None:
        return
    each = max(plan.storage.get("smallest_budget_gb", 0.0) for plan in plans)
    if count * each + code_bytes / GB > total:
        least = round_up(count * each + code_bytes / GB)
        valid = f"valid: {least:g} or more, for {count} cells that need up to {each:g} GB each, and their code"
        raise ConfigError("storage.sweep_budget_gb", total, valid)


def _name_and_root(configs: list[Config], named: bool) -> tuple[str, Path]:
    """Name the sweep: by `run.name`, or by what runs and eight digits of what decides the weights."""
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


def check_sweep_directory(sweep: SweepPlan) -> None:
    """See that the sweep's directory is free, or holds a sweep; writes nothing.

    Raises:
        ConfigError: it holds something else.
    """
    path = sweep.directory
    for above in (path, *path.parents):
        if above.exists() and not above.is_dir():
            raise ConfigError("run.root", str(sweep.root), f"valid: a directory; {above} is none")
    if path.exists() and not (path / SWEEP_MANIFEST).exists():
        cells = {cell.name for cell in sweep.cells}  # made by a command that was killed, or is about to say so
        if {p.name for p in path.iterdir() if p.name[0] != "."} - cells - {"logs"}:
            raise ConfigError("run.name", sweep.name, f"{path} exists and is no sweep; choose another run.name")


def check_cells(sweep: SweepPlan) -> None:
    """See that the cells' directories are free, or hold these very cells. The caller holds the sweep's lock.

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
            check_run_directory(cell.plan)
        except ConfigError as error:
            refused[cell.name] = str(error)
    if refused:
        raise _refusal(refused, len(sweep.cells))


def manifest_of(sweep: SweepPlan) -> SweepManifest:
    """Read the sweep's manifest, or begin one."""
    if not (sweep.directory / SWEEP_MANIFEST).exists():
        return SweepManifest(name=sweep.name)
    return read_sweep_manifest(sweep.directory)


def merged(sweep: SweepPlan) -> SweepManifest:
    """Merge the cells of `sweep` into its manifest: old ones keep their indices, new ones follow."""
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

"""Job arrays: which cells go into one, and handing it to Slurm."""

import os
from collections import defaultdict
from pathlib import Path

from outlast.config.cluster import SlurmCluster
from outlast.deletion import delete
from outlast.errors import SlurmError
from outlast.files import write_atomically
from outlast.rundir.place import place_of
from outlast.rundir.submission import Submission, new_token
from outlast.rundir.sweep import SweepManifest
from outlast.slurm.actions import max_array_size
from outlast.slurm.environment import slurm_conf
from outlast.slurm.refusal import refusal_of
from outlast.slurm.submit import submit_recorded

from ..planning.batch_script import Target, batch_script
from ..planning.sweep import PlannedCell, SweepPlan
from ..runs.queue import ranges

Array = tuple[list[PlannedCell], list[int], int]
"""Cells, their indices, and the offset of the array's tasks."""


def arrays_of(cells: list[PlannedCell], manifest: SweepManifest) -> list[Array]:
    """Group cells by array: those of one ask the same of Slurm, and its task numbers stay below Slurm's limit.

    Raises:
        SlurmError: Slurm does not say what its limit is.
    """
    index = {cell.name: cell.index for cell in manifest.cells}
    size = max_array_size()
    groups: dict[tuple[str, int], list[PlannedCell]] = defaultdict(list)
    for cell in cells:
        config = cell.plan.config
        asked = repr((config.cluster, config.parallel, config.preemption.signal, config.preemption.lead_s))
        groups[asked, index[cell.name] // size * size].append(cell)
    return [(group, [index[cell.name] for cell in group], offset) for (_, offset), group in groups.items()]


def submit(
    sweep: SweepPlan,
    manifest: SweepManifest,
    cells: list[PlannedCell],
    indices: list[int],
    target: Target,
    lock: int,
    arrays: int,
) -> Submission:
    """Hand one array to Slurm, and write that into the manifest before and after.

    Args:
        lock: the descriptor of the sweep's submission lock.
        arrays: how many are submitted now; they share `cluster.array_parallelism`.

    Raises:
        ConfigError: Slurm refuses it, and the manifest is as before.
        SlurmError: Slurm does not answer.
    """
    config = cells[0].plan.config
    assert isinstance(config.cluster, SlurmCluster)
    number = len(manifest.submissions) + 1
    script = sweep.directory / ("job.sbatch" if number == 1 else f"job-{number}.sbatch")
    write_atomically(script, batch_script(config, target), private=True)
    for cell in cells:
        _link(script, cell.plan.directory.path / "job.sbatch")
    at_once = config.cluster.array_parallelism
    limit = f"%{max(at_once // arrays, 1)}" if at_once else ""
    manifest.submissions.append(
        Submission(
            token=new_token(),
            cluster=config.cluster.kind,
            slurm_conf=slurm_conf(),
            log=str(target.log),
            indices=indices,
            offset=target.offset,
            place=place_of(sweep.directory),
        )
    )

    def record(entry: Submission) -> None:
        manifest.submissions[-1] = entry
        manifest.write(sweep.directory)

    tasks = ranges([index - target.offset for index in indices])
    try:
        return submit_recorded(manifest.submissions[-1], script, [f"--array={tasks}{limit}"], lock, record)
    except SlurmError as error:
        refusal = refusal_of(error, config.flat())
        if refusal is None:
            raise
        manifest.submissions.pop()
        manifest.write(sweep.directory)
        delete(script, inside=sweep.directory)
        raise refusal from None


def _link(script: Path, link: Path) -> None:
    """Put the script that a cell was submitted with into its directory, as a hard link where possible."""
    delete(link, inside=link.parent)
    try:
        os.link(script, link)
    except OSError:
        write_atomically(link, script.read_text(), private=True)

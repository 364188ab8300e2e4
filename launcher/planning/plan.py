"""The plan: everything that `train` would decide, as a value that can be printed before anything starts."""

import importlib
import shlex
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from outlast.checkpoint import interval
from outlast.checkpoint.compatibility import origin_of
from outlast.checkpoint.strangers import refuse_strangers
from outlast.config.cluster import LocalCluster, SlurmCluster
from outlast.config.configuration import Config, load
from outlast.config.trainer_keys import LENGTH, length_refusal
from outlast.errors import ConfigError, ResumeRefusedError
from outlast.ranks.layout import layout
from outlast.rundir import ancestry
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger
from outlast.rundir.sweep import SWEEP_MANIFEST

from . import storage
from .batch_script import batch_script, target_of
from .fork import Fork, check_same
from .secret_scan import refuse_secrets


@dataclass(frozen=True)
class Plan:
    """What will run, where, and with what."""

    config: Config
    resources: dict[str, Any]
    script: str | None
    """The batch script, as it will be submitted; None for `cluster=local`."""
    grace: dict[str, Any]
    storage: dict[str, Any]
    training: dict[str, Any]
    """How the rows of an optimizer step are spread, and the configuration of the engine that trains, if it has one."""
    checkpoint: dict[str, Any]
    """When periodic checkpoints are made, and why then."""
    hazards: list[str] = field(default_factory=list)
    fork: Fork | None = None
    """What it takes over from another run, before its first attempt."""

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.config.directory)

    def as_dict(self) -> dict[str, Any]:
        values = asdict(replace(self, fork=None))
        del values["config"], values["fork"]
        forked = {} if self.fork is None else {"fork": self.fork.as_dict()}
        return {"run": str(self.directory.path), **values, **forked}


def plan_run(config: Config, *, with_script: bool = True, fork: Fork | None = None) -> Plan:
    """Check the configuration with the job that will get it, and decide.

    Args:
        with_script: the cells of a sweep share one, which is made for the sweep.
        fork: what the run is to take over from another.

    Raises:
        ConfigError: a value that the job, or the cluster, would not accept.
        SlurmError: `cluster=slurm` on a machine without Slurm.
    """
    refuse_secrets(config)
    job = importlib.import_module(f"outlast.jobs.{config.job.name}")
    job.check(config)
    parallel, cluster, hazards, script = config.parallel, config.cluster, [], None
    grace: dict[str, Any] = {"signals": ["TERM", "USR1", "USR2"]}
    if isinstance(cluster, SlurmCluster):
        lead_s, limit_s = config.preemption.lead_s, cluster.time_min * 60
        if lead_s >= limit_s:
            raise ConfigError("preemption.lead_s", lead_s, f"valid: less than the time limit ({limit_s} s)")
        grace |= {"signal": config.preemption.signal, "lead_s": lead_s, "time_limit_s": limit_s}
        grace["grace_s"] = config.preemption.grace_s
        if lead_s * 4 > limit_s:
            hazards.append(f"each attempt stops {lead_s} s before its time limit of {limit_s} s: much of it is lost")
        if with_script:
            script = batch_script(config, target_of(config))
    if isinstance(cluster, LocalCluster) and parallel.nodes > 1:
        hazards.append(f"parallel.nodes is {parallel.nodes}: all {parallel.world_size} ranks run on this one machine")
    training = job.training(config)
    hazards += training.pop("hazards", [])
    weights = fork.bytes if fork is not None and not fork.ancestry.optimizer else 0
    stored, storage_hazards = storage.decide(config, job, own_code=with_script, weights=weights)
    return Plan(
        config=config,
        resources={
            "cluster": cluster.kind,
            "parallel": parallel.kind,
            "launch": parallel.launch,
            "nodes": parallel.nodes,
            "ranks": parallel.world_size,
            "cpus_per_rank": parallel.cpus_per_rank,
            "gpus_per_rank": parallel.gpus_per_rank,
        },
        script=script,
        grace=grace,
        storage=stored,
        training=_training(config, training),
        checkpoint=_checkpoint(config),
        hazards=[" ".join(hazard.split()) for hazard in (*hazards, *storage_hazards)],  # a line each
        fork=fork,
    )


def _training(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    """Spread a step's rows over the ranks; a run that has begun keeps its global batch.

    Raises:
        ConfigError: its global batch can't be made of so many.
    """
    ranks, micro_batch, accumulation = config.parallel.world_size, values["micro_batch"], values["accumulation"]
    made = None
    with suppress(OSError):  # `check_run_directory` says what is wrong with the place
        made = origin_of(RunDirectory(config.directory))
    try:
        if made is not None:
            accumulation = layout(made, ranks=ranks, micro_batch=micro_batch, accumulation=accumulation).accumulation
    except ResumeRefusedError as error:
        raise ConfigError("parallel.nodes * parallel.ranks_per_node", ranks, str(error)) from None
    return values | {"accumulation": accumulation, "global_batch": ranks * micro_batch * accumulation}


def _checkpoint(config: Config) -> dict[str, Any]:
    """Say when periodic checkpoints are made. For a run that has begun, its ledger counts."""
    section = config.checkpoint
    try:
        events = Ledger(RunDirectory(config.directory).ledger).read()
    except OSError:
        events = []  # `check_run_directory` says what is wrong with the place, before anything starts
    pace = interval.SaveInterval(section, events, time.time())
    bounds = {"lower_s": interval.LOWER_S, "largest_share": interval.LARGEST_SHARE, "upper_s": interval.UPPER_S}
    return {
        "every": section.steps or (section.seconds and f"{section.seconds:g}s") or "auto",
        "mode": pace.mode,
        "milestone_every": section.milestone_every,
        "mtbf_hours": section.mtbf_hours,
        "bounds": bounds if pace.mode == "auto" else None,
        "explanation": pace.explanation,
    }


def check_run_directory(plan: Plan) -> None:
    """See that the run directory is free, or holds this very run; writes nothing.

    A run directory belongs to one value of what decides the weights, from its first checkpoint on. Resources,
    preemption, checkpoint interval and budget may be changed from one submission to the next.

    Raises:
        ConfigError: the directory holds another run.
        ResumeRefusedError: it holds checkpoints that no run has made.
    """
    run, config = plan.directory, plan.config
    for path in (run.path, *run.path.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError("run.root", config.run.root, f"valid: a directory; {path} is none")
    begins_with = ancestry.read(run)
    if run.config.exists():
        before = load(run.config)
        changed = config.differences(before)
        if changed and begins_with is not None:
            check_same(before, config, begins_with.run)
        if changed and not may_be_redefined(run):
            changes = "; ".join(
                f"{key} is {mine!r}, the run was made with {its!r}" for key, (mine, its) in changed.items()
            )
            valid = f"that run is another one: {changes}. Choose another run.name{_longer(config, changed)}."
            raise ConfigError("run.name", run.path.name, valid)
    elif begins_with is not None:
        if plan.fork is None:
            way_out = f"it was to begin with {begins_with.words}: repeat that command, or remove {run.path}"
            raise ConfigError("run.name", run.path.name, way_out)
    elif run.path.is_dir() and {p.name for p in run.path.iterdir() if p.name[0] != "."} - _BEFORE_A_RUN:
        raise ConfigError("run.name", run.path.name, f"{run.path} exists, is not empty, and is not a run directory")
    refuse_strangers(run)


def _longer(config: Config, changed: Iterable[str]) -> str:
    """How to train a run for longer where that would be another run."""
    reason = length_refusal(config.trainer)
    if reason is None or {key.removeprefix("trainer.") for key in changed} - set(LENGTH):
        return ""
    path = shlex.quote(str(config.directory))
    return f": {reason}. To go on from it nevertheless: outlast train --from {path} --optimizer run.name=… trainer.…"


def may_be_redefined(run: RunDirectory) -> bool:
    """Whether nothing of a run has been saved, so that nothing depends on what decides its weights.

    A sweep's cells are named by their values and listed with them.
    """
    saved = any(event["event"] in ("checkpoint", "finished") for event in Ledger(run.ledger).read())
    cell = (run.path.parent / SWEEP_MANIFEST).exists()
    return not (saved or cell or any(run.checkpoints.glob("checkpoint-*")))


_BEFORE_A_RUN = {"checkpoints", "logs", "plan.json", "cancelled.json"}
"""What a directory may hold before it is a run's, besides locks and temporary files: a submission was cut short, a
cell was cancelled unbegun."""

"""The storage part of a plan: what a run will write, and whether budget and file system have room."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from outlast.config.cluster import SlurmCluster
from outlast.config.configuration import Config
from outlast.config.model import PretrainedModel
from outlast.errors import ConfigError
from outlast.files import bytes_used
from outlast.rundir.ancestry import START
from outlast.rundir.directory import RunDirectory
from outlast.storage import file_system
from outlast.storage.budget import Footprint, Verdict, gb, refusal, verdict

CODE_BYTES = 7_000_000
"""Taken for the code that is copied at submission, before it is: outlast itself, and a project of usual size."""


def decide(config: Config, job: ModuleType, *, own_code: bool, weights: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Estimate, verdict and what the file system says, as plain values; and hazards.

    Args:
        job: its `footprint(config)` estimates, its `changes(config)` says what could be made smaller.
        own_code: the run directory gets a copy of the code; the cells of a sweep share one.
        weights: bytes of those that a fork begins with; what is there of them already, if that is more.

    Raises:
        ConfigError: the budget can't hold the run, or the file system surely can't.
    """
    storage, limit = config.storage, config.trainer.get("save_total_limit")
    steps = config.trainer.get("max_steps") if config.trainer.get("max_steps", -1) > 0 else None
    plan: dict[str, Any] = {"budget_gb": storage.budget_gb, "save_total_limit": limit}
    try:
        footprint = _with_code(job.footprint(config), config, own_code)
        if weights := max(weights, bytes_used(config.directory / "prepared" / START)):
            footprint = replace(footprint, fixed=footprint.fixed | {"weights to begin with": weights})
    except ConfigError:
        raise
    except Exception as error:
        if not isinstance(config.model, PretrainedModel):
            raise
        # Its configuration and its tokenizer are read by other people's code, which raises what it likes.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return plan, [f"what the run will write can't be estimated, so the first checkpoint decides: {reason}"]

    def judged(one: Footprint, *, reserve: bool = storage.reserve) -> Verdict:
        return verdict(one, storage.budget_bytes, save_total_limit=limit, steps=steps, reserve=reserve)

    found = judged(footprint)
    if not found.fits:
        raise refusal(found, storage.budget_gb, _smaller(config, job, judged, footprint, own_code))
    here, hazards = _file_system(config, found)
    hazards = [*_hazards(config, footprint, found), *hazards, *footprint.notes]
    plan |= {
        "smallest_budget_gb": found.smallest_gb,
        "save_total_limit": found.save_total_limit,
        "checkpoint_bytes": footprint.checkpoint_bytes,
        "light_bytes": footprint.light_bytes,
        "final_bytes": footprint.final_bytes,
        "fixed_bytes": footprint.fixed_bytes,
        "peak_bytes": found.peak_bytes,
        "parts": footprint.as_dict(),
        "arithmetic": found.arithmetic,
        "file_system": here,
    }
    return plan, hazards


def check_code(parts: dict[str, Any], config: Config, code_bytes: int) -> None:
    """See that the budget still holds a run, now that the size of its code is known.

    Args:
        parts: what the plan expects the run to take, as in `plan.json`.

    Raises:
        ConfigError: it does not.
    """
    footprint = Footprint.from_dict(parts)
    known = replace(footprint, fixed=footprint.fixed | {"code": code_bytes})
    found = verdict(known, config.storage.budget_bytes, reserve=config.storage.reserve)
    if not found.fits:
        raise refusal(found, config.storage.budget_gb, [])


def _with_code(footprint: Footprint, config: Config, own_code: bool) -> Footprint:
    if not own_code or not isinstance(config.cluster, SlurmCluster):
        return footprint
    taken = bytes_used(config.directory / "code") or CODE_BYTES
    return Footprint.from_dict(footprint.as_dict() | {"fixed": footprint.fixed | {"code": taken}})


def _smaller(
    config: Config, job: ModuleType, judged: Callable[..., Verdict], footprint: Footprint, own_code: bool
) -> list[tuple[str, int]]:
    """What could be changed, with the smallest budget that would do then."""
    found = []
    if config.storage.reserve:
        found.append(("storage.reserve=false", judged(footprint, reserve=False).smallest_bytes))
    for change, other in job.changes(config):
        found.append((change, judged(_with_code(job.footprint(other), config, own_code)).smallest_bytes))
    return found


def _hazards(config: Config, footprint: Footprint, found: Verdict) -> list[str]:
    hazards = []
    if found.lowered:
        hazards.append(
            f"trainer.save_total_limit={found.asked_limit} is lowered to {found.save_total_limit}: "
            f"storage.budget_gb={config.storage.budget_gb:g} has room for no more"
        )
    every, steps = config.checkpoint.milestone_every, config.trainer.get("max_steps", -1)
    if every and steps > 0:
        need, left = steps // every * footprint.light_bytes, found.budget_bytes - found.smallest_bytes
        if need > left:
            hazards.append(
                f"{steps // every} light milestones take {gb(need)}, storage.budget_gb leaves {gb(left)}: "
                "those that don't fit are deleted"
            )
    return hazards


def _file_system(config: Config, found: Verdict) -> tuple[list[dict[str, Any]], list[str]]:
    """What limits writing in the run's place, and hazards.

    Refused is only what can't become possible by deleting something: a file system or a quota smaller than the
    smallest budget. Space that is taken now may be free when the job starts.

    Raises:
        ConfigError: see above.
    """
    run, hazards = RunDirectory(config.directory), []
    try:
        known = [file_system.free_space(run.path), *_quotas(file_system.existing(Path(config.run.root)))]
        used = bytes_used(run.path)
    except OSError as error:
        return [], [f"the file system does not say what is free: {error}"]
    for limit in known:
        if limit.total_bytes < found.smallest_bytes:
            what = "the file system" if limit.kind == "free space" else f"the {limit.kind}"
            valid = f"{what} there has {gb(limit.total_bytes)} in all, the run needs {gb(found.smallest_bytes)}"
            raise ConfigError("run.root", config.run.root, f"{valid}. Choose another run.root.")
        if limit.free_bytes + used < found.peak_bytes:
            needed = found.smallest_bytes if limit.free_bytes + used < found.smallest_bytes else found.peak_bytes
            word = "needs at least" if needed == found.smallest_bytes else "may need up to"
            hazards.append(
                f"{limit.kind}: {gb(limit.free_bytes)} left on {run.path.parent}, the run {word} {gb(needed)}"
            )
    return [vars(limit) for limit in known], hazards


@lru_cache(maxsize=4)
def _quotas(place: Path) -> tuple[file_system.Limit, ...]:
    """Ask for the quotas of a place; once for all cells of a sweep."""
    return tuple(file_system.quotas(place))

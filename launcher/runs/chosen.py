"""The checkpoint that `--checkpoint` names: `final`, `best`, `newest` or a step; verified, and never another one."""

import re
from contextlib import suppress
from pathlib import Path

from outlast.checkpoint.manifest import Sealed, read_manifest, verify
from outlast.errors import CheckpointError, ConfigError
from outlast.rundir.attempts import finished
from outlast.rundir.directory import RunDirectory
from outlast.rundir.ledger import Ledger

from .settings import best_metric, settings_of

KEY = "--checkpoint"


def kept(run: RunDirectory) -> list[Sealed]:
    """The sealed checkpoints that a run has now, light ones too, by step; without the finished model."""
    found = []
    names = sorted(path for path in run.checkpoints.glob("checkpoint-*")) if run.checkpoints.is_dir() else []
    for path in names:
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir() and not path.is_symlink():
            with suppress(CheckpointError):
                found.append(Sealed(path, read_manifest(path)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def final_of(run: RunDirectory) -> Sealed | None:
    """The finished model; None if there is none yet, or its manifest can't be read."""
    try:
        return Sealed(run.final, read_manifest(run.final))
    except CheckpointError:
        return None


def best_step(run: RunDirectory, sealed: list[Sealed]) -> int | None:
    """The step of the best model: as the newest model knows it, else by the ledger's evaluations."""
    models = [*sealed, *filter(None, [final_of(run)])]
    known = [model.manifest.best_step for model in models if model.manifest.best_step is not None]
    if known:
        return known[-1]
    best = best_metric(Ledger(run.ledger).read(), settings_of(run)["trainer"])
    return int(best["step"]) if best else None


def chosen(run: RunDirectory, which: str | None, *, key: str = KEY, whole: bool = False) -> Sealed:
    """The checkpoint that `which` names, after the files that are needed were compared with its manifest.

    Args:
        which: `final`, `best`, `newest` or a step. None: the finished model, else the best, else the newest.
        key: the option that names it, for messages.
        whole: what a resume needs is needed too.

    Raises:
        ConfigError: there is no such checkpoint, it is put aside, or it is not what was written.
    """
    found = _find(run, which, key)
    try:
        return Sealed(found.path, verify(found.path, for_use=not whole))
    except CheckpointError as error:
        raise ConfigError(key, found.path.name, f"it is not what was written: {error}; {_valid(run)}") from None


def _find(run: RunDirectory, which: str | None, key: str) -> Sealed:
    sealed, final = kept(run), final_of(run)
    best = best_step(run, sealed)
    by_step = {checkpoint.step: checkpoint for checkpoint in sealed}
    if which is None:
        found = final or by_step.get(-1 if best is None else best) or (sealed[-1] if sealed else None)
        if found is None:
            raise ConfigError("RUN", run.path.name, f"it has saved no model yet; {_unsealed(run, run.final)}")
        return found
    if which == "final":
        if final is not None:
            return final
        done = finished(Ledger(run.ledger).read())
        why = "the run has published none" if done else "the run has not finished"
        raise ConfigError(key, which, f"{_unsealed(run, run.final) or why}; {_valid(run)}")
    if which == "newest":
        if sealed:
            return sealed[-1]
        raise ConfigError(key, which, f"no checkpoint is kept; {_valid(run)}")
    if which == "best":
        if best is None:
            raise ConfigError(
                key, which, f"nothing was evaluated, so that no checkpoint is known to be the best; {_valid(run)}"
            )
        if best in by_step:
            return by_step[best]
        if final is not None and final.step == best:
            return final
        raise ConfigError(key, which, f"the best is step {best}, whose checkpoint is no longer there; {_valid(run)}")
    if not which.isdecimal():
        raise ConfigError(key, which, _valid(run))
    if int(which) in by_step:
        return by_step[int(which)]
    why = _unsealed(run, run.checkpoints / f"checkpoint-{int(which)}") or f"no checkpoint of step {int(which)} is kept"
    raise ConfigError(key, which, f"{why}; {_valid(run)}")


def _unsealed(run: RunDirectory, path: Path) -> str:
    """Why a directory of this name is no checkpoint: put aside, never sealed, damaged; empty if there is none."""
    aside = sorted(run.quarantine.glob(f"{path.name}*")) if run.quarantine.is_dir() else []
    if directories := [other for other in aside if re.fullmatch(rf"{path.name}(\.\d+)?(\.kept)?", other.name)]:
        reason = directories[-1].with_name(f"{directories[-1].name}.reason.txt")
        with suppress(OSError):
            return f"{directories[-1].name} is in quarantine: {reason.read_text().strip()}"
        return f"{directories[-1].name} is in quarantine"
    if not path.is_dir():
        return ""
    try:
        read_manifest(path)
    except CheckpointError as error:
        return f"{path.name} is no sealed checkpoint: {error}"
    return ""


def _valid(run: RunDirectory) -> str:
    """What may be chosen, in words."""
    sealed, final = kept(run), final_of(run)
    best, steps = best_step(run, sealed), [checkpoint.step for checkpoint in sealed]
    names = ["final"] * (final is not None)
    names += ["best"] * (best is not None and (best in steps or (final is not None and final.step == best)))
    names += ["newest"] * bool(steps) + [str(step) for step in steps]
    return f"valid: {', '.join(names)}" if names else "valid: a run that has saved a model; this one has none"

"""`outlast evaluate`: every kept checkpoint of a run scored on the same rows, and whether the differences are noise."""

import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from outlast.checkpoint.manifest import Sealed
from outlast.config.configuration import load
from outlast.config.model import PretrainedModel
from outlast.errors import ConfigError, whose
from outlast.files import to_json
from outlast.results import evaluations
from outlast.results.paired import SIGNIFICANT, difference
from outlast.rundir.directory import RunDirectory

from ..execution import program
from ..runs.chosen import final_of, kept
from ..runs.find import is_writable, run_named


@dataclass(kw_only=True)
class Row:
    """The score of one model, and how far it is above the best of them."""

    checkpoint: str
    step: int
    final: bool
    """Whether `final/` has these weights."""
    loss: float
    """NaN if a row's is: such a model is never the best, and its difference is NaN too."""
    best: bool
    difference: float
    error: float | None
    """The standard error of the difference; None for the best itself, and for a loss that is NaN."""
    p: float | None
    more_than_noise: bool


def main(name: str, root: Path, data: Path | None, *, as_json: bool) -> int:
    """`outlast evaluate RUN`.

    Raises:
        ConfigError: the run or the data is refused.
    """
    run = run_named(name, root)
    models = _models(run)
    if data is not None and not data.is_file():
        raise ConfigError("--data", str(data), "valid: a JSON Lines file, as data.eval takes it")
    places = [str(checkpoint.path) for checkpoint in models]
    options = [f"--data={data.absolute()}"] if data is not None else []
    for place in (run.path, run.path / "evaluations"):
        if not is_writable(place):
            raise ConfigError("RUN", run.path.name, f"what is scored is kept in it: {whose(place)}")
    with tempfile.TemporaryFile("w+") as answer:  # standard output belongs to the libraries that it uses
        options.append(f"--answer={answer.fileno()}")
        arguments = (str(run.path), *places, *options)
        code = program.run("outlast.jobs.evaluation.program", *arguments, stdout=sys.stderr, kept=[answer.fileno()])
        answer.seek(0)
        text = answer.read()
    if text:
        found = json.loads(text)
        _show(run, models, Path(found["path"]), evaluations.read(Path(found["path"]), found["data"]), as_json=as_json)
    return code


def _models(run: RunDirectory) -> list[Sealed]:
    """What there is to score, by step, the finished model last.

    Raises:
        ConfigError: nothing, or nothing that this command knows how to score.
    """
    if not run.config.is_file():
        valid = "valid: a run of `outlast train job=sft`; how a script computes its loss, only the script knows"
        raise ConfigError("RUN", run.path.name, valid)
    config = load(run.config)
    if config.job.name != "sft":
        raise ConfigError("RUN", run.path.name, f"valid: a run of job=sft; this one is of job={config.job.name}")
    if isinstance(config.model, PretrainedModel) and config.model.trust_remote_code:
        raise ConfigError(
            "model.trust_remote_code", True, "valid: a model of transformers; no code of its own is run here"
        )
    final = final_of(run)
    models = kept(run)
    if "schedule_free" in str(config.trainer.get("optim", "")):
        models = []  # their weights are those that are trained, not those that are to be used
    models += [final] if final is not None else []
    if not models:
        raise ConfigError("RUN", run.path.name, "it has saved no model to score yet")
    return models


def compare(models: list[Sealed], lines: dict[str, evaluations.Line]) -> list[Row]:
    """The scores of what is there now, by step, each compared with the best on the same rows."""
    steps = {evaluations.weights_digest(model.manifest.files): model for model in models}  # final/ is the last
    names = {evaluations.weights_digest(model.manifest.files): model.path.name for model in reversed(models)}
    found = [(lines[weights], model) for weights, model in steps.items() if weights in lines]
    if not found:
        return []
    best = min((line for line, _ in found if math.isfinite(line.loss)), key=lambda line: line.loss, default=None)
    rows = []
    for line, model in sorted(found, key=lambda pair: pair[1].step):
        finite = best is not None and math.isfinite(line.loss)
        apart = difference(line.losses, best.losses) if best is not None and finite else None
        rows.append(
            Row(
                checkpoint=names[line.weights],
                step=model.step,
                final=model.path.name == "final",
                loss=line.loss,
                best=line is best,
                difference=line.loss - best.loss if best is not None else math.nan,
                error=None if line is best or apart is None else apart.error,
                p=None if line is best or apart is None else apart.p,
                more_than_noise=line is not best and (apart is None or not apart.is_noise),
            )
        )
    return rows


def _show(
    run: RunDirectory, models: list[Sealed], record: Path, lines: dict[str, evaluations.Line], *, as_json: bool
) -> None:
    rows = compare(models, lines)
    values: dict[str, Any] = {"run": run.path.name, "path": str(run.path), "record": str(record)}
    values |= {"rows": len(next(iter(lines.values())).losses) if lines else 0, "models": [asdict(row) for row in rows]}
    if as_json:
        print(to_json(values | {"overfits_from": overfits_from(rows)}, indent=1))
        return
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=200)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in ("step", "checkpoint", "loss", "above the best", "p", ""):
        table.add_column(header, overflow="fold")
    for row in rows:
        above = "" if row.error is None else f"{row.difference:.4g} ± {row.error:.2g}"
        verdict = "best" if row.best else "worse" if row.more_than_noise else "within noise"
        verdict = verdict if math.isfinite(row.loss) else "diverged"
        name = row.checkpoint + (", final" if row.final and row.checkpoint != "final" else "")
        p = "" if row.p is None else f"{row.p:.2g}"
        style = "green" if row.best else "" if row.more_than_noise else "dim"
        table.add_row(str(row.step), name, f"{row.loss:.6g}", above, p, Text(verdict, style=style))
    console.print(table)
    note = f"{values['rows']} rows of {record.stem}, paired; ± is a standard error, worse: p < {SIGNIFICANT:g}"
    console.print(Text(f"{note}. Kept in {record}", style="dim"))
    if (step := overfits_from(rows)) is not None:
        console.print(Text(f"from step {step} on it is worse than at its best by more than noise: it overfits"))


def overfits_from(rows: list[Row]) -> int | None:
    """The first step after the best from which all are worse by more than noise; None if there is none."""
    best = next((number for number, row in enumerate(rows) if row.best), len(rows))
    later = rows[best + 1 :]
    start = len(later)
    while start and later[start - 1].more_than_noise:
        start -= 1
    return later[start].step if start < len(later) else None

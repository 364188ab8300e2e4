"""`outlast export`: a run's model as a directory for others. What can be seen to be wrong is refused here."""

import os
from pathlib import Path

from outlast.errors import ConfigError, whose
from outlast.results.export import refuse_taken
from outlast.results.source import Source
from outlast.storage.file_system import existing

from ..execution import program
from ..runs.chosen import chosen
from ..runs.find import run_named


def main(name: str, root: Path, to: Path, which: str, *, merge: bool, dtype: str | None, as_json: bool) -> int:
    """`outlast export RUN --to DIR`.

    Raises:
        ConfigError: the run, the checkpoint or the directory is refused.
    """
    run = run_named(name, root)
    target = to.expanduser().resolve()
    if target.is_relative_to(run.path.resolve()):
        raise ConfigError("--to", str(to), f"valid: a directory outside of the run's own, {run.path}")
    refuse_taken(target)
    if not os.access(place := existing(target.parent), os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError("--to", str(to), f"valid: where this user may write; {whose(place)}")
    source = Source(run, chosen(run, which).path)
    source.check()
    if merge and source.adapter is None:
        raise ConfigError("--merge", True, f"{source.path.name} is a whole model, without adapters; leave --merge out")
    options = [
        *(["--merge"] if merge else []),
        *(["--dtype", dtype] if dtype else []),
        *(["--json"] if as_json else []),
    ]
    return program.run(
        "outlast.results.program", "export", str(run.path), str(source.path), "--to", str(target), *options
    )

"""`outlast try`: a few tokens from a run's model."""

import math
from pathlib import Path

from outlast.errors import ConfigError
from outlast.results.source import Source

from ..execution import program
from ..runs.chosen import chosen
from ..runs.find import run_named


def main(
    name: str,
    root: Path,
    prompt: str,
    which: str | None,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    plain: bool,
    as_json: bool,
) -> int:
    """`outlast try RUN PROMPT`.

    Raises:
        ConfigError: the run, the checkpoint or an option is refused.
    """
    if max_tokens < 1:
        raise ConfigError("--max-tokens", max_tokens, "valid: 1 or more")
    if not 0 <= temperature < math.inf:
        raise ConfigError("--temperature", temperature, "valid: 0, for the likeliest token each time, or more")
    run = run_named(name, root)
    source = Source(run, chosen(run, which).path)
    source.check()
    numbers = ["--max-tokens", str(max_tokens), f"--temperature={temperature}", f"--seed={seed}"]
    options = [f"--prompt={prompt}", *numbers, *(["--plain"] if plain else []), *(["--json"] if as_json else [])]
    return program.run("outlast.results.program", "try", str(run.path), str(source.path), *options)

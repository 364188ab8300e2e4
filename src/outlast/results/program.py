"""The program behind `outlast export` and `outlast try`: `python -m outlast.results.program VERB RUN CHECKPOINT`."""

import argparse
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

from outlast.checkpoint.manifest import MANIFEST
from outlast.errors import ConfigError, Exit, OutlastError, denied
from outlast.files import to_json
from outlast.processes import PARENT_ENV, SIGNALS, die_with
from outlast.rundir.directory import RunDirectory
from outlast.storage.budget import gb

from .source import Source


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m outlast.results.program", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    export, tried = verbs.add_parser("export"), verbs.add_parser("try")
    for verb in (export, tried):
        verb.add_argument("run", type=Path)
        verb.add_argument("checkpoint", type=Path)
        verb.add_argument("--json", action="store_true")
    export.add_argument("--to", type=Path, required=True)
    export.add_argument("--merge", action="store_true")
    export.add_argument("--dtype")
    tried.add_argument("--prompt", required=True)
    tried.add_argument("--max-tokens", type=int, required=True)
    tried.add_argument("--temperature", type=float, required=True)
    tried.add_argument("--seed", type=int, required=True)
    tried.add_argument("--plain", action="store_true")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"[outlast] {text}", file=sys.stderr, flush=True)


def _export(source: Source, arguments: argparse.Namespace) -> None:
    from .export import export

    done = export(source, arguments.to, merge=arguments.merge, dtype=arguments.dtype, say=_say)
    if arguments.json:
        values = {"run": str(source.run.path), "checkpoint": source.path.name, "to": str(arguments.to)}
        print(to_json(values | vars(done), indent=1))
        return
    what = "adapters, merged into their base model" if done.merged else "adapters" if done.base else "a whole model"
    apart = "" if done.apart is None else f"; logits are within {done.apart:.1e} of the run's"
    print(f"{arguments.to}: {what}, {done.dtype}, {gb(done.bytes)}{apart}")
    if done.base is not None:
        local = Path(done.base).is_absolute()
        hint = ", a directory of this machine: a receiver needs it too, or use --merge" if local else ""
        print(f"base model: {done.base}{hint}")


def _try(source: Source, arguments: argparse.Namespace) -> None:
    from .generate import generate

    options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature, "seed": arguments.seed}
    found = generate(source, arguments.prompt, **options, plain=arguments.plain)
    if arguments.json:
        print(to_json({"run": str(source.run.path), "checkpoint": source.path.name} | vars(found), indent=1))
    else:
        print(found.text)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(f"outlast: stopped by {signal.Signals(number).name}; nothing was written")


def _command() -> int:
    for number in (*SIGNALS, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    die_with(PARENT_ENV, signal.SIGTERM)
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    arguments = _arguments()
    source = Source(RunDirectory(arguments.run), arguments.checkpoint)
    try:
        (_export if arguments.verb == "export" else _try)(source, arguments)
    except Exception as error:  # whatever a library makes of a file that is gone
        failed: Exception = error
        if not (source.path / MANIFEST).is_file():
            why = f"the run has deleted it meanwhile ({error}); choose again"
            failed = ConfigError("--checkpoint", source.path.name, why)
        if not isinstance(failed, OutlastError | OSError):
            raise
        print(f"outlast: {denied(failed) or failed}", file=sys.stderr)
        return failed.exit_code if isinstance(failed, OutlastError) else Exit.FAILED
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(_command())

"""The program behind `outlast evaluate`: scores what is not yet in the record, and adds it line by line.

A signal ends it between two rows with exit code 75; the same command goes on with what is missing.
"""

import argparse
import fcntl
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from outlast.attempt.loading import guard_loads
from outlast.checkpoint.manifest import Sealed, check_files, is_weights, read_manifest
from outlast.config.configuration import load
from outlast.errors import CheckpointError, Exit, OutlastError, denied
from outlast.processes import PARENT_ENV, SIGNALS, die_with
from outlast.results.evaluations import Line, append, path_of, read, require_room, weights_digest
from outlast.rundir.directory import RunDirectory
from outlast.storage.share import Share

ROW_BYTES = 12
"""Bytes that a row takes in the record, about."""


class _Stopped(Exception):
    """A signal has come."""


class _Signal:
    """The last signal that came, if any."""

    number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number


def main(run: RunDirectory, checkpoints: list[Path], file: Path | None, answer: int, stop: _Signal) -> int:
    """Score the checkpoints, and return the exit code.

    Args:
        answer: number of an open file, for JSON: the `path` of the record and the digest of the `data`.

    Raises:
        OutlastError: the data or the base model can't be loaded, or the budget has no room.
    """
    guard_loads(run)
    config = load(run.config)
    with tempfile.TemporaryDirectory(prefix="outlast-evaluate-") as scratch, _alone(run, stop):
        from .scoring import Scorer, mean

        say("loading the model and the data")
        scorer = Scorer(run, config, file, Path(scratch))
        path, failed = path_of(run, scorer.name), False
        done, share = read(path, scorer.data), Share(run, config.storage)
        with os.fdopen(answer, "w") as opened:
            json.dump({"path": str(path), "data": scorer.data}, opened)
        for place in checkpoints:
            began = said = time.monotonic()

            def poll(row: int, rows: int, place: Path = place) -> None:
                nonlocal said
                if stop.number is not None:
                    raise _Stopped
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    say(f"{place.name}: {row}/{rows} rows")

            try:
                sealed = Sealed(place, read_manifest(place))
                weights = weights_digest(sealed.manifest.files)
                if weights in done:
                    continue
                files = {name: entry for name, entry in sealed.manifest.files.items() if is_weights(name)}
                check_files(place, files)
                require_room(run, path, scorer.rows * ROW_BYTES, share())  # before the work
                losses = scorer.score(sealed, poll)
            except _Stopped:
                say(f"stopped by {signal.Signals(stop.number or 0).name}; the same command goes on with {place.name}")
                return Exit.RESUME_ME
            except (CheckpointError, FileNotFoundError) as error:
                if place.is_dir():
                    say(f"WARNING: {place.name} is left out: {error}")
                    failed = True
                continue
            line = Line(
                checkpoint=place.name, step=sealed.step, weights=weights, data=scorer.data, name=scorer.name,
                loss=mean(losses), losses=losses, seconds=time.monotonic() - began, time=time.time(),
            )  # fmt: skip
            append(run, path, line, share())
            done[weights] = line
            say(f"{place.name}: loss {line.loss:.6g}, {line.seconds:.1f} s")
    return Exit.FAILED if failed else Exit.DONE


@contextmanager
def _alone(run: RunDirectory, stop: _Signal) -> Iterator[None]:
    """Wait while another process scores this run, so that nothing is scored twice.

    Raises:
        _Stopped: a signal has come.
    """
    place = run.path / "evaluations"
    place.mkdir(exist_ok=True)
    fd, said = os.open(place, os.O_RDONLY | os.O_DIRECTORY), False
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.number is not None:
                    raise _Stopped from None
                if not said:
                    say("waiting for another `outlast evaluate` of this run")
                said = True
                time.sleep(0.5)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(fd)


def say(text: str) -> None:
    """Print a line for the user."""
    print(f"[outlast] {text}", file=sys.stderr, flush=True)


def _command() -> int:
    stop = _Signal()
    for number in (*SIGNALS, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    die_with(PARENT_ENV, signal.SIGTERM)
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    parser = argparse.ArgumentParser(prog="python -m outlast.jobs.evaluation.program", allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--answer", type=int, required=True)
    arguments = parser.parse_args()
    try:
        return main(RunDirectory(arguments.run), arguments.checkpoints, arguments.data, arguments.answer, stop)
    except _Stopped:
        return Exit.RESUME_ME
    except OutlastError as error:
        print(f"outlast: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"outlast: {denied(error) or error}", file=sys.stderr)
        return Exit.FAILED


if __name__ == "__main__":
    sys.exit(_command())

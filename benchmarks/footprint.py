"""The estimate of a checkpoint's bytes, made before anything runs, against the bytes of a real one.

For each case a small model is trained for one step, by one rank or by two with DeepSpeed's ZeRO, on CPUs, and what is
sealed at its end is compared with what `outlast plan` would have said. Rows for `docs/storage.md`.

Example:
    python benchmarks/footprint.py                 # all cases, a Markdown table; about six minutes on two cores
    python benchmarks/footprint.py --json "zero3 lora"    # cases whose name begins so
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from footprint_cases import RANKS, Case, cases, estimate, prepare, train

PRELOADED = (
    *(
        "outlast.script",
        "outlast.jobs.estimate.footprint",
        "outlast.jobs.training.models",
        "outlast.huggingface.trainer",
    ),
    *("torch", "transformers.trainer", "trl.trainer.sft_trainer", "peft", "datasets"),
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),
)
"""Imported once. The modules that do the work are named: `trl` and `transformers` import theirs only when asked."""


def _logged(act: Any, log: Path, *arguments: Any) -> None:
    """Run `act` with its output, and that of the libraries below, in a file."""
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        act(*arguments)


def compare(case: Case, scratch: Path) -> dict[str, Any]:
    """Estimate and truth of one case, in bytes, by part."""
    from outlast.checkpoint.manifest import MANIFEST, read_manifest
    from outlast.processes import free_ports
    from outlast.storage.budget import Footprint, by_part

    port = free_ports(1)[0]
    logs = [scratch / f"rank-{rank}.log" for rank in range(RANKS if case.stage else 1)]
    _run([_process(estimate, scratch / "estimate.log", case, scratch)], [scratch / "estimate.log"])
    _run([_process(train, log, case, scratch, rank, port) for rank, log in enumerate(logs)], logs)
    run = scratch / case.name.replace(" ", "-")
    found = Footprint.from_dict(json.loads((scratch / "estimate.json").read_text()))
    real = {}
    for key, directory in (("checkpoint", run / "checkpoints" / "checkpoint-1"), ("final", run / "final")):
        files = {name: int(entry["bytes"]) for name, entry in read_manifest(directory).files.items()}
        real[key] = by_part(files | {MANIFEST: (directory / MANIFEST).stat().st_size})
    return {"case": asdict(case), "name": case.name, "estimate": found.as_dict(), "real": real, "notes": found.notes}


def _process(act: Any, log: Path, *arguments: Any) -> ForkServerProcess:
    return multiprocessing.get_context("forkserver").Process(target=_logged, args=(act, log, *arguments))


def _run(processes: list[ForkServerProcess], logs: list[Path]) -> None:
    for process in processes:
        process.start()
    try:
        for process, log in zip(processes, logs, strict=True):
            process.join()
            if process.exitcode:
                raise SystemExit(f"footprint.py: exit code {process.exitcode}\n" + log.read_text()[-3000:])
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def deviation(row: dict[str, Any], key: str = "checkpoint") -> float:
    """Of the estimate from the real bytes, as a share of these."""
    real = sum(row["real"][key].values())
    return (sum(row["estimate"][key].values()) - real) / real


def table(rows: list[dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    lines = ["| ranks | trained | type | optimizer | estimate, kB | real, kB | off by | finished model off by |"]
    lines += ["|---|---|---|---|---:|---:|---:|---:|"]
    for row in rows:
        case = row["case"]
        ranks = {"one": "1"}.get(case["parallel"], f"{RANKS}, ZeRO {case['parallel'][-1]}")
        trained = {"none": "everything", "lora": "LoRA"}[case["peft"]]
        sizes = [sum(row[key]["checkpoint"].values()) / 1000 for key in ("estimate", "real")]
        lines.append(
            f"| {ranks} | {trained} | {case['dtype']} | {case['optim']} | {sizes[0]:,.0f} | {sizes[1]:,.0f} "
            f"| {deviation(row):+.2%} | {deviation(row, 'final'):+.2%} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compare the cases that were asked for, one after the other."""
    text = argparse.RawDescriptionHelpFormatter
    arguments = argparse.ArgumentParser(prog="footprint.py", description=__doc__, formatter_class=text)
    arguments.add_argument("pattern", nargs="*", default=[""], help="cases whose name begins so")
    arguments.add_argument("--json", action="store_true", help="every part of every case instead of a table")
    options = arguments.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # threads that wait for each other cost the most
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    chosen = list(dict.fromkeys(case for pattern in options.pattern for case in cases(pattern)))
    rows = []
    with tempfile.TemporaryDirectory(prefix="outlast-footprint-") as directory:
        scratch = Path(directory)
        _run([_process(prepare, scratch / "prepare.log", scratch)], [scratch / "prepare.log"])
        for number, case in enumerate(chosen, 1):
            rows.append(compare(case, scratch))
            print(f"{number}/{len(chosen)} {case.name}: {deviation(rows[-1]):+.2%}", file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
import socket
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

RANKS = 2
"""With ZeRO."""
TINY = {"kind": "tiny", "vocab_size": 2048, "hidden_size": 128, "layers": 3, "heads": 4, "max_length": 128}
TEXTS = [{"text": f"Sentence number {i} of a text that is not long. " * 4} for i in range(16)]
PRELOADED = ("outlast", "outlast.jobs.footprint", "torch", "transformers", "trl", "peft", "deepspeed")


@dataclass(frozen=True)
class Case:
    """One way to train."""

    parallel: str
    """`one` rank, or `zero1` to `zero3`."""
    peft: str
    dtype: str
    optim: str

    @property
    def name(self) -> str:
        return f"{self.parallel} {self.peft} {self.dtype} {self.optim}"

    @property
    def stage(self) -> int:
        return int(self.parallel[-1]) if self.parallel.startswith("zero") else 0

    def config(self, scratch: Path) -> Any:
        from outlast import config

        trainer: dict[str, Any] = {"optim": self.optim, "max_steps": 1, "max_length": 64, "logging_steps": 1}
        trainer |= {"report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": 2}
        trainer |= {"optim_args": "momentum=0.9"} if self.optim == "sgd" else {}
        trainer |= {"bf16": True} if self.stage and self.dtype == "bf16" else {}
        data = scratch / "train.jsonl"
        return config.build(
            {
                "run": {"root": str(scratch), "name": self.name.replace(" ", "-")},
                "model": {
                    "kind": "pretrained",
                    "path": str(scratch / "model"),
                    "dtype": {"bf16": "bfloat16", "fp32": "float32"}[self.dtype],
                },
                "data": {"kind": "jsonl", "train": str(data)},
                "peft": {"kind": self.peft},
                "parallel": {"ranks_per_node": RANKS if self.stage else 1},
                "trainer": trainer,
            }
        )


def cases(pattern: str) -> list[Case]:
    """Those whose name begins with `pattern`."""
    every = product(("one", "zero1", "zero2", "zero3"), ("lora", "none"), ("fp32", "bf16"), ("adamw_torch", "sgd"))
    more = [Case("one", peft, "fp32", optim) for peft in ("lora", "none") for optim in ("adafactor", "rmsprop")]
    return [case for case in (*(Case(*values) for values in every), *more) if case.name.startswith(pattern)]


# What runs in processes of their own ----------------------------------------------------------------------------


def prepare(scratch: Path) -> None:
    """The model that all cases start from, and the data."""
    from outlast import config
    from outlast.jobs import models  # noqa: TID251

    (scratch / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    texts = (row["text"] for row in TEXTS)
    models.prepare_tiny(config.build({"model": TINY}), texts, scratch / "model")


def estimate(case: Case, scratch: Path) -> None:
    """What the plan would say."""
    from outlast.jobs import footprint  # noqa: TID251

    found = footprint.footprint(case.config(scratch), zero_stage=case.stage)
    (scratch / "estimate.json").write_text(json.dumps(found.as_dict()))


def train(case: Case, scratch: Path, rank: int, port: int) -> None:
    """One rank of a real run, to its end: a checkpoint and the finished model."""
    ranks = RANKS if case.stage else 1
    os.environ["OMP_NUM_THREADS"] = "1"
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import outlast

    if case.stage:  # before anything builds a state; with use_cpu DeepSpeed would be ignored
        os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    import torch
    import transformers.training_args
    from accelerate import PartialState
    from datasets import Dataset
    from trl import SFTTrainer

    from outlast.jobs import models, trainer_args  # noqa: TID251

    torch.set_num_threads(1)
    config = case.config(scratch)
    extra: dict[str, Any] = {}
    if case.stage:
        PartialState(backend="gloo")
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # it trains, here on a CPU
        extra = {
            "deepspeed": _deepspeed(case),
            "accelerator_config": {"use_configured_state": True},
            "use_cpu": False,
            "ddp_backend": None,
        }
    run = outlast.start(config.directory, every_steps=1)
    model, tokenizer = models.load(config, scratch / "model")
    trainer = SFTTrainer(
        model=model,
        args=trainer_args.sft_config(config, run.directory.checkpoints, **extra),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=tokenizer,
        peft_config=models.peft_config(config),
    )
    run.train(trainer)
    sys.stdout.flush()
    os._exit(0)  # process groups that are still there have nothing to say


def _deepspeed(case: Case) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.dtype == "bf16"},
    }


def _logged(act: Any, log: Path, *arguments: Any) -> None:
    """Run `act` with its output, and that of the libraries below, in a file."""
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        act(*arguments)


# The comparison -------------------------------------------------------------------------------------------------


def compare(case: Case, scratch: Path) -> dict[str, Any]:
    """Estimate and truth of one case, in bytes, by part."""
    from outlast.budget import Footprint, by_part
    from outlast.checkpoint.manifest import MANIFEST, read_manifest

    port = _free_port()
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deviation(row: dict[str, Any], key: str = "checkpoint") -> float:
    """Of the estimate from the real bytes, as a share of these."""
    real = sum(row["real"][key].values())
    return (sum(row["estimate"][key].values()) - real) / real


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
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
    text = argparse.RawDescriptionHelpFormatter
    arguments = argparse.ArgumentParser(prog="footprint.py", description=__doc__, formatter_class=text)
    arguments.add_argument("pattern", nargs="*", default=[""], help="cases whose name begins so")
    arguments.add_argument("--json", action="store_true", help="every part of every case instead of a table")
    options = arguments.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
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

"""The sections of a configuration: one typed dataclass each, for groups one for each of their options.

`conf/*.yaml` holds the defaults that a user sees and composes; the classes here hold the types and the checks, so
that a value is refused where it is made.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast.errors import ConfigError

SIGNALS = ("USR1", "USR2", "TERM")
JOBS = ("sft", "smoke")
LAUNCHERS = ("srun", "accelerate")
DIFFERENCES = ("dataset", "seed", "global_batch", "trainable", "config", "restart")
"""What a checkpoint may be allowed to differ in from the run that resumes it (`checkpoint.allow`); `restart`: begin at
step 0 if none of the checkpoints verifies."""


def require(ok: bool, key: str, value: Any, valid: str) -> None:
    """Refuse a value (ConfigError) unless `ok`."""
    if not ok:
        raise ConfigError(key, value, valid)


@dataclass(kw_only=True)
class RunSection:
    """Where the run lives."""

    name: str | None = None
    """Directory name under `root`; left out, it is derived from the configuration."""
    root: str = "runs"
    """Where run directories live; on a cluster, a file system that all nodes share."""

    def __post_init__(self) -> None:
        name = self.name
        ok = name is None or (name.strip() == name != "" and name.isprintable() and not {"/", "%", ":"} & set(name))
        require(ok and name not in (".", ".."), "run.name", name, "valid: a directory name, without '/', '%' and ':'")
        require(":" not in self.root, "run.root", self.root, "valid: a path without ':', which PYTHONPATH splits at")
        self.root = str(Path(self.root).expanduser().absolute())


@dataclass(kw_only=True)
class JobSection:
    """What runs."""

    name: str = "sft"
    """Which program of the `jobs` room runs: `sft` or `smoke`."""

    def __post_init__(self) -> None:
        if self.name not in JOBS:
            raise ConfigError("job.name", self.name, JOBS)


@dataclass(kw_only=True)
class TinyModel:
    """A Llama built from this configuration, its tokenizer trained on the data; deterministic by `seed`."""

    kind: str = "tiny"
    vocab_size: int = 4096
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    max_length: int = 1024

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "layers", "heads", "max_length"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "valid: a positive integer")
        require(
            self.vocab_size >= 300,
            "model.vocab_size",
            self.vocab_size,
            "valid: 300 or more (256 bytes + specials)",
        )
        even = self.hidden_size % (2 * self.heads) == 0
        require(
            even,
            "model.hidden_size",
            self.hidden_size,
            f"valid: a multiple of 2 * model.heads ({2 * self.heads})",
        )


@dataclass(kw_only=True)
class PretrainedModel:
    """A model that `save_pretrained` has written, here or on the hub."""

    kind: str = "pretrained"
    path: str | None = None
    """A local directory, or a name on the Hugging Face hub."""
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(
            bool(self.path),
            "model.path",
            self.path,
            "valid: a local directory or a hub name; model=pretrained needs it",
        )
        valid = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in valid:
            raise ConfigError("model.dtype", self.dtype, valid)
        if Path(self.path or "").expanduser().is_dir():
            self.path = str(Path(self.path or "").expanduser().absolute())


@dataclass(kw_only=True)
class PythonDocs:
    """Prompt/completion pairs from the documentation that ships with Python."""

    kind: str = "python_docs"
    max_pairs: int = 3000
    eval_fraction: float = 0.05

    def __post_init__(self) -> None:
        require(self.max_pairs >= 20, "data.max_pairs", self.max_pairs, "valid: 20 or more")
        require(0 < self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "valid: between 0 and 1")


@dataclass(kw_only=True)
class JsonlData:
    """One JSON object a line: `prompt` and `completion`, or `messages`, or `text`."""

    kind: str = "jsonl"
    train: str | None = None
    eval: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", self.train, "valid: a JSON Lines file; data=jsonl needs it")
        for key, value in (("data.train", self.train), ("data.eval", self.eval)):
            require(value is None or Path(value).is_file(), key, value, "valid: a file that exists")
        self.train = str(Path(self.train or "").absolute())
        self.eval = str(Path(self.eval).absolute()) if self.eval else None


@dataclass(kw_only=True)
class HubData:
    """A dataset by its name on the Hugging Face hub (or a local directory that `datasets` can load)."""

    kind: str = "hub"
    path: str | None = None
    name: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", self.path, "valid: a dataset's name on the hub; data=hub needs it")


@dataclass(kw_only=True)
class Lora:
    """Low-rank adapters on frozen weights (PEFT's `LoraConfig`)."""

    kind: str = "lora"
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: Any = "all-linear"
    """A name, or a list of names, of the modules that get an adapter (PEFT's `target_modules`)."""

    def __post_init__(self) -> None:
        require(self.r > 0, "peft.r", self.r, "valid: a positive integer")
        require(self.alpha > 0, "peft.alpha", self.alpha, "valid: a positive integer")
        require(0 <= self.dropout < 1, "peft.dropout", self.dropout, "valid: from 0 to below 1")


@dataclass(kw_only=True)
class NoPeft:
    """Full fine-tuning."""

    kind: str = "none"


@dataclass(kw_only=True)
class Ddp:
    """Data parallel training: one process (rank) per accelerator, or per share of the CPU cores."""

    kind: str = "ddp"
    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 2
    """Cores and threads of a rank. The order of CPU sums depends on it, so it is part of what makes a run exact."""
    gpus_per_rank: int = 0
    launch: str = "srun"
    """What starts a node's ranks: `srun`, one task per rank; or `accelerate launch`, an agent, as its one task."""

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node", "cpus_per_rank"):
            require(getattr(self, name) > 0, f"parallel.{name}", getattr(self, name), "valid: a positive integer")
        require(self.gpus_per_rank in (0, 1), "parallel.gpus_per_rank", self.gpus_per_rank, "valid: 0 or 1")
        if self.launch not in LAUNCHERS:
            raise ConfigError("parallel.launch", self.launch, LAUNCHERS)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def zero_stage(self) -> int:
        """Of DeepSpeed's ZeRO; 0 without DeepSpeed."""
        return 0


@dataclass(kw_only=True)
class Zero(Ddp):
    """Data parallel training with DeepSpeed's ZeRO: each rank keeps a part of the optimizer's state (`zero1`), of the
    gradients too (`zero2`), of the weights too (`zero3`); `zero3_offload` keeps all of these in the CPU's memory."""

    kind: str = "zero1"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's configuration; what outlast derives from the rest of the configuration may not be
    contradicted (`jobs/deepspeed.py`)."""

    @property
    def zero_stage(self) -> int:
        return int(self.kind.removeprefix("zero")[0])

    @property
    def offload(self) -> bool:
        return self.kind.endswith("_offload")


@dataclass(kw_only=True)
class LocalCluster:
    """This machine, in the foreground."""

    kind: str = "local"
    requeue_delay_s: float = 1.0
    """Seconds between an attempt that was preempted and the next."""
    parallel_cells: int = 1
    """Cells of a sweep that run at a time."""

    def __post_init__(self) -> None:
        valid = "valid: seconds, 0 or more"
        require(self.requeue_delay_s >= 0, "cluster.requeue_delay_s", self.requeue_delay_s, valid)
        require(self.parallel_cells > 0, "cluster.parallel_cells", self.parallel_cells, "valid: a positive integer")


@dataclass(kw_only=True)
class SlurmCluster:
    """A Slurm cluster. Fields left at null are not passed on, so the site's defaults hold."""

    kind: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_min: int = 60
    """Time limit of one attempt, in minutes (`--time`)."""
    mem_gb: float | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    setup: list[str] = field(default_factory=list)
    """Shell lines that the batch script runs before `srun` (modules, environment)."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Any other `sbatch` flag, without the dashes: `cluster.sbatch.reservation=x`."""
    srun: dict[str, Any] = field(default_factory=dict)
    """Any further `srun` flag, likewise: `cluster.srun.cpu-bind=cores`."""
    code_limit_mb: float = 100.0
    """MB (10^6 bytes) that the files of your project may take, which are copied when the run is submitted."""
    array_parallelism: int | None = None
    """Cells of a sweep that run at a time; None: as many as Slurm has room for."""

    def __post_init__(self) -> None:
        cells, valid = self.array_parallelism, "valid: a positive integer, or null"
        require(cells is None or cells > 0, "cluster.array_parallelism", cells, valid)
        limit, valid = self.code_limit_mb, "valid: a positive number of MB"
        require(0 < limit < math.inf, "cluster.code_limit_mb", limit, valid)
        require(self.time_min > 0, "cluster.time_min", self.time_min, "valid: minutes, 1 or more")
        require(
            self.mem_gb is None or 0 < self.mem_gb < math.inf, "cluster.mem_gb", self.mem_gb, "valid: a positive number"
        )


@dataclass(kw_only=True)
class PreemptionSection:
    """When to leave, and how often to come back."""

    signal: str = "USR1"
    """The signal that Slurm sends `lead_s` before the time limit. TERM, USR1 and USR2 all mean "save and leave"."""
    lead_s: int = 90
    """Seconds before the time limit at which the signal comes, and at which the job acts by its own clock."""
    grace_s: float | None = None
    """Seconds from a preemption's signal to the kill; None: what Slurm says of the partition or QOS (`GraceTime`)."""
    hang_s: float | None = 120.0
    """Seconds without a sign of life from a rank after which the others end the attempt; None: they wait for it."""
    requeue_delay_s: int = 5
    """Seconds from the requeue to the next start: how far Slurm's requeue hold is brought forward."""
    max_requeues: int = 1000
    """Requeues after which the run gives up (exit code 93)."""
    max_crashes: int = 2
    """Crashes in a row, without a new checkpoint in between, that are tried again; one more, and the run has failed."""

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise ConfigError("preemption.signal", self.signal, SIGNALS)
        require(self.lead_s >= 5, "preemption.lead_s", self.lead_s, "valid: seconds, 5 or more")
        require(
            self.requeue_delay_s >= 1,
            "preemption.requeue_delay_s",
            self.requeue_delay_s,
            "valid: seconds, 1 or more",
        )
        grace, valid = self.grace_s, "valid: seconds, 0 or more, or null"
        require(grace is None or 0 <= grace < math.inf, "preemption.grace_s", grace, valid)
        hang, valid = self.hang_s, "valid: seconds, 2 or more, or null"
        require(hang is None or 2 <= hang < math.inf, "preemption.hang_s", hang, valid)
        require(self.max_requeues >= 0, "preemption.max_requeues", self.max_requeues, "valid: 0 or more")
        require(self.max_crashes >= 0, "preemption.max_crashes", self.max_crashes, "valid: 0 or more")


@dataclass(kw_only=True)
class CheckpointSection:
    """When to save, what to keep, and what a resume may differ in."""

    every: Any = "auto"
    """When to save: `auto`, optimizer steps (500), or a time (`90s`, `30min`, `2h`). See `checkpoint/cadence.py`."""
    every_steps: int | None = None
    """`every` in steps, by its older name. It goes before `auto`, which is what `every` is if nothing is said."""
    every_minutes: float | None = None
    """`every` as a time in minutes; it goes before `auto` likewise."""
    milestone_every: int | None = None
    """Steps between milestones: checkpoints that are made whatever `every` says, and kept."""
    mtbf_hours: float = 24.0
    """Hours expected between failures of the run that come *without* notice; preemptions with notice don't count."""
    allow: list[str] = field(default_factory=list)
    """Differences between a checkpoint and the run (of `DIFFERENCES`) that are accepted on resume."""

    def __post_init__(self) -> None:
        steps, minutes, hours = self.every_steps, self.every_minutes, self.mtbf_hours
        for name, value in (("every_steps", steps), ("milestone_every", self.milestone_every)):
            require(value is None or value > 0, f"checkpoint.{name}", value, "valid: a positive integer, or null")
        valid = "valid: a positive number of minutes, or null"
        require(minutes is None or 0 < minutes < math.inf, "checkpoint.every_minutes", minutes, valid)
        require(0 < hours < math.inf, "checkpoint.mtbf_hours", hours, "valid: a positive number of hours")
        for name in self.allow:
            if name not in DIFFERENCES:
                raise ConfigError("checkpoint.allow", name, DIFFERENCES)
        given = {"every": _interval(self.every), "every_steps": (steps, None)}
        given["every_minutes"] = (None, None if minutes is None else minutes * 60)
        given = {name: interval for name, interval in given.items() if interval != (None, None)}
        first = next(iter(given), "every")
        self._interval: tuple[int | None, float | None] = given.get(first, (None, None))
        for name, interval in given.items():
            other = f"checkpoint.{first} is {getattr(self, first)!r}; give one of the two"
            require(interval == self._interval, f"checkpoint.{name}", getattr(self, name), other)

    @property
    def steps(self) -> int | None:
        """Optimizer steps between periodic checkpoints; None if time decides (`seconds`, or the rule of `auto`)."""
        return self._interval[0]

    @property
    def seconds(self) -> float | None:
        """Seconds between periodic checkpoints, as configured; None if steps decide, or the rule of `auto`."""
        return self._interval[1]


def _interval(every: Any) -> tuple[int | None, float | None]:
    """What `checkpoint.every` means: (steps, None), (None, seconds), or (None, None) for `auto`."""
    if every == "auto":
        return None, None
    time = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", every) if isinstance(every, str) else None
    seconds = float(time[1]) * {"s": 1, "min": 60, "h": 3600}[time[2]] if time else None
    ok = 0 < seconds < math.inf if seconds is not None else type(every) is int and every > 0
    require(ok, "checkpoint.every", every, "valid: auto, a number of steps (500), or a time (90s, 30min, 2h)")
    return (every, None) if seconds is None else (None, seconds)


@dataclass(kw_only=True)
class StorageSection:
    """What the run may take of the disk."""

    budget_gb: float = 10.0
    """Bytes that the run directory may take, in GB (10^9 bytes)."""
    sweep_budget_gb: float | None = None
    """Bytes that all cells of a sweep may take together, in GB; what finished cells don't use goes to the others."""
    reserve: bool = False
    """Keep a file of the size of one checkpoint inside the budget, given up when an emergency save needs the room."""

    def __post_init__(self) -> None:
        valid = "valid: a positive number of GB"
        require(0 < self.budget_gb < math.inf, "storage.budget_gb", self.budget_gb, valid)
        sweep = self.sweep_budget_gb
        require(sweep is None or 0 < sweep < math.inf, "storage.sweep_budget_gb", sweep, f"{valid}, or null")

    @property
    def budget_bytes(self) -> int:
        return int(self.budget_gb * 1e9)

    @property
    def sweep_budget_bytes(self) -> int | None:
        return None if self.sweep_budget_gb is None else int(self.sweep_budget_gb * 1e9)

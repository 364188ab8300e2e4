"""Finds what a model is made of: a checkpoint's weights, the base model under its adapters, its tokenizer.

Nothing here needs a training library, so that what can't be used is refused at once.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from outlast.config.configuration import Config
from outlast.config.configuration import load as load_config
from outlast.config.model import PretrainedModel, TinyModel
from outlast.errors import ConfigError
from outlast.files import read_json
from outlast.rundir.directory import RunDirectory

ADAPTER, MODEL = "adapter_config.json", "config.json"
TOKENIZER = "tokenizer_config.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Number formats as safetensors and as torch call them."""


@dataclass(frozen=True)
class Source:
    """A checkpoint of a run, or its finished model, as something to be loaded."""

    run: RunDirectory
    path: Path

    @cached_property
    def config(self) -> Config | None:
        """The run's configuration; None for that of a script, which has none."""
        return load_config(self.run.config) if self.run.config.is_file() else None

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """PEFT's configuration of the adapters; None for a whole model."""
        found = read_json(self.path / ADAPTER)
        return found if isinstance(found, dict) else None

    @property
    def shards(self) -> bool:
        """Whether the weights are DeepSpeed's shards alone."""
        return not any(self.path.glob("*.safetensors")) and any(self.path.glob("global_step*"))

    def check(self) -> None:
        """Refuse what `from_pretrained` would not read.

        Raises:
            ConfigError: it is no model of transformers, or one that brings code of its own.
        """
        if self.adapter is None and not (self.path / MODEL).is_file():
            valid = "valid: a checkpoint of a Hugging Face Trainer, with config.json or adapter_config.json; this one "
            raise ConfigError("--checkpoint", self.path.name, f"{valid}holds {_names(self.path)}")
        if not self.shards and not any(self.path.glob("*.safetensors")):
            raise ConfigError("--checkpoint", self.path.name, f"it holds no *.safetensors: {_names(self.path)}")
        described = read_json(self.base_path / MODEL) if self.base_path is not None else read_json(self.path / MODEL)
        code = isinstance(described, dict) and described.get("auto_map")
        if code or (isinstance(self._model, PretrainedModel) and self._model.trust_remote_code):
            valid = "valid: a model of transformers; this one comes with Python code of its own, which is not run here"
            raise ConfigError("model", self.base or self.path.name, valid)

    @property
    def _model(self) -> TinyModel | PretrainedModel | None:
        return self.config.model if self.config else None

    @cached_property
    def base(self) -> str | None:
        """The name or path of the base model under adapters; None for a whole model.

        Raises:
            ConfigError: it is a directory that is not there, or nothing says what it was.
        """
        if self.adapter is None:
            return None
        match self._model:
            case TinyModel():
                base = str(self.run.prepared / "model")
            case PretrainedModel() as model:
                base = str(model.path)
            case _:
                base = str(self.adapter.get("base_model_name_or_path") or "")
        if not base:
            raise ConfigError("base_model_name_or_path", base, f"{self.path / ADAPTER} does not name the base model")
        path = Path(base).expanduser()
        if path.is_dir():
            return str(path.absolute())
        if base.startswith(("/", "./", "../", "~")) or base.count("/") > 1:
            raise ConfigError("model.path", base, "valid: a directory that exists; the adapters need their base model")
        return base

    @property
    def base_path(self) -> Path | None:
        """The directory of the base model; None if it is a name on the hub, or there is none."""
        return Path(self.base) if self.base is not None and Path(self.base).is_dir() else None

    @property
    def base_is_inside(self) -> bool:
        """Whether the base model lies in the run directory, so that nobody else has it."""
        return self.base_path is not None and self.base_path.resolve().is_relative_to(self.run.path.resolve())

    @property
    def dtype(self) -> str:
        """The number format to load the model in. For a base model it is that of the run; else see :attr:`formats`."""
        if self.adapter is not None:
            return self._model.dtype if isinstance(self._model, PretrainedModel) else "auto"
        if len(self.formats) > 1:
            return "float64" if "float64" in self.formats else "float32"  # which holds the numbers of all of them
        return next(iter(self.formats), "auto")

    @cached_property
    def formats(self) -> set[str]:
        """The number formats of the weights in the files."""
        found = {tensor["dtype"] for file in self.path.glob("*.safetensors") for tensor in header(file).values()}
        return {DTYPES[name] for name in found if name in DTYPES}

    @property
    def is_causal(self) -> bool:
        """Whether training has loaded the base model as a causal language model, whatever it calls itself."""
        return self.config is not None and self.config.job.name == "sft"

    @property
    def tokenizer(self) -> Path | str | None:
        """Where the tokenizer is; None if the run has saved none and has no base model."""
        return self.path if (self.path / TOKENIZER).is_file() else self.base


def header(file: Path) -> dict[str, Any]:
    """The names of a safetensors file, each with `dtype`, `shape` and `data_offsets`."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        found: dict[str, Any] = json.loads(opened.read(size))
    found.pop("__metadata__", None)
    return found


def _names(path: Path) -> str:
    return ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"

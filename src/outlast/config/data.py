"""What a model is trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .section import Number, Section, require


@dataclass(kw_only=True)
class PythonDocs(Section):
    """Prompt/completion pairs from the documentation that ships with Python; needs no network."""

    kind: Literal["python_docs"] = "python_docs"
    max_pairs: Annotated[int, Number("pairs", ge=20)] = 3000
    """Pairs to use, at most."""
    eval_fraction: Annotated[float, Number(gt=0, lt=1)] = 0.05
    """Share of the pairs that is kept for evaluation."""


@dataclass(kw_only=True)
class JsonlData(Section):
    """JSON Lines files; each line has `prompt` and `completion`, or `messages`, or `text`."""

    kind: Literal["jsonl"] = "jsonl"
    train: str | None = None
    """File to train on; required."""
    eval: str | None = None
    """File to evaluate on; null: no evaluation."""

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", self.train, "valid: a JSON Lines file; data=jsonl needs it")
        self.train = str(Path(self.train or "").absolute())
        self.eval = str(Path(self.eval).absolute()) if self.eval else None


@dataclass(kw_only=True)
class HubData(Section):
    """A dataset of the Hugging Face hub, or a local directory that `datasets` can load."""

    kind: Literal["hub"] = "hub"
    path: str | None = None
    """Name on the hub, or local directory; required."""
    name: str | None = None
    """Configuration of the dataset, if it has several."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str | None = None
    """Split to evaluate on; null: no evaluation."""
    revision: str | None = None
    """Branch, tag or commit of the dataset; null: the newest."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", self.path, "valid: a dataset's name on the hub; data=hub needs it")

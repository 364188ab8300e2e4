"""Makes or loads the model and the tokenizer of a run: a tiny one made here, or a pretrained one."""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.checkpoint.listing import write_listing
from outlast.config.configuration import Config
from outlast.config.model import Lora, PretrainedModel, TinyModel
from outlast.errors import ConfigError, OutlastError

if TYPE_CHECKING:
    from peft import LoraConfig

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
"""Special tokens of the tiny tokenizer; END is its `eos_token`."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}"
    "{{ '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""ChatML; what the assistant says is marked, so that `trainer.assistant_only_loss` works."""


def prepare_tiny(config: Config, texts: Iterable[str], directory: Path) -> None:
    """Write the model and the tokenizer of `model=tiny` into `directory` (a staged one, so that it is published whole).

    The same configuration and texts give the same bytes. The model's vocabulary is `model.vocab_size`, so that its
    size in bytes follows from the configuration; the tokenizer's is smaller where the texts are few.
    """
    import torch
    from transformers import LlamaForCausalLM

    tiny = config.model
    assert isinstance(tiny, TinyModel)
    tokenizer = _train_tokenizer(texts, tiny)
    llama = tiny_config(tiny, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(llama)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_listing(directory)


def tiny_config(tiny: TinyModel, **tokens: int | None) -> Any:
    """Return the `LlamaConfig` of `model=tiny`.

    Args:
        tokens: ids of special tokens; what they are changes no size.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=tiny.vocab_size,
        hidden_size=tiny.hidden_size,
        intermediate_size=4 * tiny.hidden_size,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.heads,
        max_position_embeddings=tiny.max_length,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        dtype="float32",
        **tokens,
    )


def _train_tokenizer(texts: Iterable[str], tiny: TinyModel) -> Any:
    """Train a byte-level BPE tokenizer, to which no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.vocab_size,
        special_tokens=[END, PAD, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=tiny.max_length,
        clean_up_tokenization_spaces=False,
    )


def load(config: Config, directory: Path) -> tuple[Any, Any]:
    """Load the model, on the CPU, and its tokenizer, which has a pad token.

    Args:
        directory: where `prepare_tiny` made the tiny model; not looked at for a pretrained one.

    Raises:
        ConfigError: `model.path` names no directory, or a model that can't be padded.
        OutlastError: the model can't be loaded.
    """
    match config.model:
        case TinyModel():
            path, dtype, trust, key = str(directory), "float32", False, "model=tiny"
        case PretrainedModel() as chosen:
            path, dtype, trust, key = str(chosen.path), chosen.dtype, chosen.trust_remote_code, "model.path"
            _check_path(path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust)
    except Exception as error:  # the hub's client and every file format raise their own kinds
        raise OutlastError(f"{key}: {path!r} can't be loaded: {_reason(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                "model.path", path, "its tokenizer has no eos_token and no pad_token; valid: one that has"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def known_tokenizer(config: Config) -> Any | None:
    """Load the tokenizer of a pretrained model for a plan; None for a tiny model, and if it can't be loaded here."""
    chosen = config.model
    return _tokenizer(str(chosen.path), chosen.trust_remote_code) if isinstance(chosen, PretrainedModel) else None


@lru_cache(maxsize=4)
def _tokenizer(path: str, trust: bool) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except Exception:  # the plan says so when it estimates what the run will write
        return None


def check(config: Config) -> None:
    """Refuse a model that can be seen to be missing without training libraries (ConfigError)."""
    if isinstance(config.model, PretrainedModel):
        _check_path(str(config.model.path))


def _check_path(path: str) -> None:
    """Refuse a path that looks like a directory and is none; anything else may be a name on the hub."""
    if not path.startswith(("/", "./", "../", "~")) and path.count("/") < 2:
        return
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ConfigError(
            "model.path", path, "valid: a directory that exists, or a name on the hub"
        ) from FileNotFoundError(path)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            "model.path", path, "it holds no config.json; valid: a directory that save_pretrained wrote"
        ) from FileNotFoundError(path)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    hint = "without a network, give a local directory"
    if os.environ.get("HF_HUB_OFFLINE"):
        hint = "HF_HUB_OFFLINE is set, so only local directories and what is cached can be used"
    return f"{type(error).__name__}: {lines[0] if lines else ''} ({hint})"


def peft_config(config: Config) -> "LoraConfig | None":
    """Return the adapter to train, or None for full fine-tuning."""
    if not isinstance(config.peft, Lora):
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.peft.r,
        lora_alpha=config.peft.alpha,
        lora_dropout=config.peft.dropout,
        target_modules=config.peft.target_modules,
        modules_to_save=config.peft.modules_to_save,
    )

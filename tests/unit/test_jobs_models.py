"""The model and the tokenizer of a run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import outlast.config.configuration
from outlast.errors import ConfigError, OutlastError
from outlast.jobs.training import models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch and its dependencies about each other

TINY = {"vocab_size": 400, "hidden_size": 32, "layers": 1, "heads": 2, "max_length": 64}
TEXTS = ["What does `len` do?\n", "Return the number of items in a container.", "naïve café 日本"] * 20


def tiny(**values: Any) -> outlast.config.configuration.Config:
    return outlast.config.configuration.build({"model": TINY, **values})


def pretrained(path: Path | str, **values: Any) -> outlast.config.configuration.Config:
    return outlast.config.configuration.build({"model": {"kind": "pretrained", "path": str(path), **values}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    models.prepare_tiny(tiny(), TEXTS, directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_configuration_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    models.prepare_tiny(tiny(), TEXTS, tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before), "the run's own random numbers are left alone"
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= contents(made).keys()
    assert contents(tmp_path / "again") == contents(made)


def test_another_process_with_other_threads_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    program = (
        "import sys, outlast.config.configuration; from pathlib import Path; from outlast.jobs.training import models;"
        f"models.prepare_tiny(outlast.config.configuration.build({{'model': {TINY!r}}}), {TEXTS!r}, Path(sys.argv[1]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "other")], check=True, env=environment)
    assert contents(tmp_path / "other") == contents(made)


def test_another_seed_gives_other_weights_and_the_same_tokenizer(made: Path, tmp_path: Path) -> None:
    models.prepare_tiny(tiny(seed=7), TEXTS, tmp_path / "other")
    mine, other = contents(made), contents(tmp_path / "other")
    assert mine["tokenizer.json"] == other["tokenizer.json"]
    assert mine["model.safetensors"] != other["model.safetensors"]


def test_the_tiny_model_is_what_the_configuration_says(made: Path) -> None:
    import torch

    model, tokenizer = models.load(tiny(), made)
    assert model.dtype == torch.float32
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (400, 64)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= 400
    text = "Unseen: Größe  ✓\n\tend"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_few_texts_leave_the_size_of_the_model_as_configured(tmp_path: Path) -> None:
    models.prepare_tiny(tiny(), ["a"], tmp_path / "few")
    model, tokenizer = models.load(tiny(), tmp_path / "few")
    assert len(tokenizer) < model.config.vocab_size == 400


def test_a_chat_is_rendered_and_what_the_assistant_says_is_marked(made: Path) -> None:
    _, tokenizer = models.load(tiny(), made)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "yo<|im_end|>"


def test_a_pretrained_model_is_loaded_in_the_dtype_asked_for(made: Path) -> None:
    import torch

    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        model, _ = models.load(pretrained(made, dtype=dtype), Path("/unused"))
        assert model.dtype == expected


def test_a_tokenizer_without_a_pad_token_pads_with_eos(made: Path, tmp_path: Path) -> None:
    model, tokenizer = models.load(tiny(), made)
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, loaded = models.load(pretrained(tmp_path), Path("/unused"))
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>"


def test_what_is_no_model_is_refused_by_name(tmp_path: Path, made: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: '/nowhere' is refused; valid: a directory that exists"):
        models.load(pretrained("/nowhere"), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path: .* it holds no config\.json"):
        models.load(pretrained(tmp_path), tmp_path)
    for name, content in contents(made).items():
        (tmp_path / name).write_bytes(content[:100] if name == "model.safetensors" else content)
    with pytest.raises(OutlastError, match=r"model\.path: .* can't be loaded: SafetensorError"):
        models.load(pretrained(tmp_path), tmp_path)


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutlastError, match=r"model\.path: 'nobody/nothing' can't be loaded.*local directory"):
        models.load(pretrained("nobody/nothing"), tmp_path)


def test_remote_code_is_not_run_unless_asked_for(made: Path, tmp_path: Path) -> None:
    for name, content in contents(made).items():
        (tmp_path / name).write_bytes(content)
    auto_map = (
        b'{"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil",'
    )
    (tmp_path / "config.json").write_bytes(
        auto_map + contents(made)["config.json"].lstrip()[1:].replace(b'"llama"', b'"evil"')
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(OutlastError, match=r"model\.path"):
        models.load(pretrained(tmp_path), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_peft_config() -> None:
    assert models.peft_config(tiny(peft={"kind": "none"})) is None
    lora = models.peft_config(tiny(peft={"kind": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}))
    assert lora is not None
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 32, 0.05)
    assert lora.target_modules == {"q_proj", "v_proj"}
    assert str(lora.task_type).endswith("CAUSAL_LM")

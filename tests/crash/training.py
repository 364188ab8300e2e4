"""The script under test, as one rank: TRL's SFTTrainer on a tiny model, and outlast in three lines.

It runs in a process forked by `fork_server.py`. Beside training it does what an `Attempt` asks of it: signals itself in
a step, fills the disk, arms `file_events.c` around the save that is looked at.
"""

import ctypes
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

import outlast

from .attempt import Arming, Attempt

PAGE = os.sysconf("SC_PAGE_SIZE")
MODES = {"log": 1, "kill": 2, "tear": 3}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(60)} | {"<pad>": 60, "<eos>": 61, "<unk>": 62}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def data() -> Dataset:
    draw = torch.Generator().manual_seed(1)
    return Dataset.from_list([{"input_ids": torch.randint(0, 60, (12,), generator=draw).tolist()} for _ in range(64)])


def model(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            pad_token_id=60,
            eos_token_id=61,
            bos_token_id=None,
        )
    )


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def warm_up() -> None:
    """What the libraries compute once in a process, so that it is there before the fork."""
    get_peft_model(model(16), lora())


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def last_rank() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) - 1


def main(attempt: Attempt) -> None:
    if attempt.bound:
        be_bound_by_permissions()
    arming = attempt.arming if attempt.arming and attempt.arming.rank == rank() else None
    if arming and arming.window == "recovery":
        arm(attempt.directory, arming)
    run = outlast.start(
        attempt.directory,
        every=attempt.every,
        milestone_every=attempt.milestone_every,
        budget_gb=attempt.budget_gb,
    )
    trainer = SFTTrainer(
        model=model(attempt.hidden),
        args=SFTConfig(
            output_dir=attempt.directory,
            max_steps=attempt.steps,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            save_strategy="no",
            save_total_limit=attempt.limit,
            logging_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data(),
        processing_class=tokenizer(),
        peft_config=lora() if attempt.lora else None,
    )
    trainer.add_callback(Conductor(trainer, attempt, arming))
    run.train(trainer)
    if arming and arming.window == "final":
        disarm()


class Conductor(TrainerCallback):
    """Before outlast's own callback: what happens to the run. What is to come after that one, `Armourer` does."""

    def __init__(self, trainer: SFTTrainer, attempt: Attempt, arming: Arming | None) -> None:
        self.trainer, self.attempt, self.arming = trainer, attempt, arming

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.add_callback(Armourer(self.attempt, self.arming))
        if self.attempt.file_bytes is not None and rank() == last_rank():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.attempt.file_bytes, resource.RLIM_INFINITY))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        attempt = self.attempt
        if rank() == 0 and state.global_step == attempt.fill_at:
            fill(Path(attempt.ballast), attempt.leave, Path(attempt.directory) / "ledger.jsonl")
        if rank() == 0 and state.global_step == attempt.free_at:
            Path(attempt.ballast).unlink()
        if state.global_step == attempt.stop_at:  # on all ranks: then none passes the end of this step
            os.kill(os.getpid(), signal.SIGUSR1)


class Armourer(TrainerCallback):
    """Added last, so that nothing but the save comes between arming and disarming."""

    def __init__(self, attempt: Attempt, arming: Arming | None) -> None:
        self.of_process = threading.local()  # its attributes are no state of the run, which a resume would restore
        self.of_process.asked = attempt, arming

    @property
    def attempt(self) -> Attempt:
        return self.of_process.asked[0]  # type: ignore[no-any-return]

    @property
    def arming(self) -> Arming | None:
        return self.of_process.asked[1]  # type: ignore[no-any-return]

    @property
    def window(self) -> str | None:
        return self.arming.window if self.arming else None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.window == "recovery":
            disarm()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.arming and self.window == "save" and state.global_step == self.arming.step:
            arm(self.attempt.directory, self.arming)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.arming and self.window == "save" and state.global_step == self.arming.step:
            disarm()  # `on_save` is called inside the save

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.arming and self.window == "final":
            arm(self.attempt.directory, self.arming)


def arm(directory: str, arming: Arming) -> None:
    preloaded = ctypes.CDLL(None)
    number = ctypes.c_long(arming.number)
    if preloaded.file_events_arm(directory.encode(), MODES[arming.what], number, arming.log.encode()) != 0:
        raise OSError(f"file events of {directory} can't be armed")


def disarm() -> None:
    ctypes.CDLL(None).file_events_disarm()


def fill(ballast: Path, leave: int, ledger: Path) -> None:
    """Take all the room there is but for `leave` bytes; the ledger's next line finds none in its last page."""
    with open(ledger, "ab") as file:
        file.write(b"\n" * (-file.tell() % PAGE))
    disk = os.statvfs(ballast.parent)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - leave)


def be_bound_by_permissions() -> None:
    """Drop CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER: a mode of 000 then means root, too."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the low 32 of them, then the high
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    for i in range(2):
        data[i] &= ~(1 << 1 | 1 << 2 | 1 << 3)
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")

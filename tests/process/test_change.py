"""A run that is resumed with values that do not decide the weights trains on as if it had begun with them."""

from collections.abc import Callable

from tests.conftest import Command, RunProbe

SFT = (
    "job=sft", "model.vocab_size=300", "model.hidden_size=16", "model.layers=1", "model.heads=2", "data.max_pairs=40",
    "parallel.cpus_per_rank=1", "trainer.eval_strategy=no", "trainer.load_best_model_at_end=false",
    "trainer.lr_scheduler_type=constant", "trainer.max_length=64",
)  # fmt: skip


def test_a_run_can_be_made_longer(outlast: Callable[..., Command], probe: Callable[[str], RunProbe]) -> None:
    command = outlast("train", *SFT, "trainer.max_steps=200", "run.name=r")
    probe("r").reach(5)
    command.process.terminate()
    assert command.wait() == 75, command.output
    saved = probe("r").saved()
    longer = f"trainer.max_steps={saved + 7}"
    command = outlast("resume", "r", longer, "trainer.logging_steps=1", "trainer.dataloader_num_workers=1")
    assert command.wait() == 0, command.output
    twin = outlast("train", *SFT, longer, "run.name=twin")
    assert twin.wait() == 0, twin.output
    assert probe("r").events("finished")[0]["step"] == saved + 7
    assert probe("r").weights() == probe("twin").weights()

"""On the PYTHONPATH of a run, its ranks write down what their Trainer really does, step by step, into $WATCH.

Lines of `rank-<n>.jsonl`: the rows of each micro-batch, by digests of their tokens; what is logged at each step. At the
last step, the optimizer's moments as `moments.pt`. Nothing is changed, but that rank 0 stops the command at the
beginning of step $WATCH_STOP, as Ctrl-C would.
"""

import hashlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
STOP = int(os.environ.get("WATCH_STOP", "0"))


def write(**line: Any) -> None:
    with open(Path(os.environ["WATCH"], f"rank-{RANK}.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\n")


def watch(trainer_class: Any) -> None:
    """Look over the shoulder of every Trainer."""
    step, log, after = trainer_class.training_step, trainer_class.log, trainer_class._maybe_log_save_evaluate

    def watched_step(self: Any, model: Any, inputs: Any, *arguments: Any) -> Any:
        number = self.state.global_step + 1
        tokens = inputs["input_ids"]
        mask = inputs.get("attention_mask", tokens.new_ones(tokens.shape))  # rows that are packed have none
        texts = [str(row[kept.bool()].tolist()).encode() for row, kept in zip(tokens, mask, strict=True)]
        write(step=number, rows=[hashlib.sha256(text).hexdigest()[:16] for text in texts])
        if RANK == 0 and number == STOP:
            os.kill(os.getppid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # at once: what the launcher passes on comes a little later
        return step(self, model, inputs, *arguments)

    def watched_log(self: Any, logs: dict[str, float], *arguments: Any) -> None:
        if RANK == 0:
            found = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate") if key in logs}
            write(step=self.state.global_step, epoch=self.state.epoch, logged=found)
        log(self, logs, *arguments)

    def watched_after(self: Any, *arguments: Any, **named: Any) -> None:
        if self.state.global_step == self.state.max_steps:
            save_moments(self)
        after(self, *arguments, **named)

    trainer_class.training_step, trainer_class.log = watched_step, watched_log
    trainer_class._maybe_log_save_evaluate = watched_after


def save_moments(trainer: Any) -> None:
    """Adam's moments of each parameter that is trained; all ranks, since ZeRO gathers them."""
    import torch

    moments = {}
    for name, parameter in trainer.model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            if trainer.is_deepspeed_enabled:
                from deepspeed.utils import safe_get_full_optimizer_state

                moments[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment)
            else:
                moments[f"{name} {moment}"] = trainer.optimizer.state[parameter][moment]
    if RANK == 0:
        torch.save(moments, Path(os.environ["WATCH"], "moments.pt"))


class AfterImport:
    """Finds `transformers.trainer` as everybody does, and watches what it defines."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_watch(module: Any) -> None:
            execute(module)
            watch(module.Trainer)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


if "outlast.rank" in sys.orig_argv:
    if "transformers.trainer" in sys.modules:  # in a rank that was forked
        watch(sys.modules["transformers.trainer"].Trainer)
    else:
        sys.meta_path.insert(0, AfterImport())  # type: ignore[arg-type]

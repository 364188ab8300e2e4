"""The training script that the benchmark starts: a randomly initialized Llama, trained in full, in fp32, by a Trainer.

It is run as `workload.py OPTIONS`, with `OPTIONS` a JSON object: `mode` ("stall", "outlast" or "jit"), `directory`,
`gb`, and for "stall" `rounds` and `seed`. It writes JSON lines to what was its standard output; what the libraries
print goes to standard error. It ends with its parent, at the latest: when its standard input is closed.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BYTES_PER_PARAMETER = 12  # fp32: the weight, and AdamW's two moments
LAYERS, HEAD = 12, 64
Emit = Callable[..., None]


def llama_sizes(gb: float) -> dict[str, int]:
    """Sizes of a Llama whose weights and AdamW state take `gb` GB (10^9 bytes): three quarters in layers, the rest in
    the vocabulary."""
    parameters = gb * 1e9 / BYTES_PER_PARAMETER
    hidden = max(int((0.75 * parameters / (12 * LAYERS)) ** 0.5) // HEAD * HEAD, HEAD)
    in_layers = LAYERS * (4 * hidden**2 + 3 * hidden * (8 * hidden // 3))
    return {
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
        "vocab_size": max(int((parameters - in_layers) / (2 * hidden)), 128),
    }


def build_trainer(gb: float, output: Path, **arguments: Any) -> Any:
    """A Trainer with a model of `gb` GB of state, and more random tokens than it will ever see. Nothing is saved
    unless somebody asks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    set_seed(0)
    sizes = llama_sizes(gb)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    rows = [torch.randint(sizes["vocab_size"], (32,)) for _ in range(64)]
    data = [{"input_ids": row, "labels": row} for row in rows] * 2000
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 1,
        "max_steps": len(data),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(model=model, args=TrainingArguments(**(settings | arguments)), train_dataset=data)


def train_until_signalled(mode: str, gb: float, directory: Path, emit: Emit) -> None:
    """Report every step, until a signal ends it: by outlast, or by the Trainer's own `enable_jit_checkpoint`."""
    run = None
    if mode == "outlast":
        import outlast

        run = outlast.start(directory / "run", budget_gb=100 * gb)
    from transformers import TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            emit(step=state.global_step + 1, time=time.time())

    trainer = build_trainer(gb, directory / "trainer", enable_jit_checkpoint=run is None)
    trainer.add_callback(Report())
    if run is not None:
        run.train(trainer)
    else:
        trainer.train()


def main() -> None:
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    options = json.loads(sys.argv[1])
    mode, gb, directory = options["mode"], options["gb"], Path(options["directory"])

    def emit(**values: Any) -> None:
        results.write(json.dumps(values) + "\n")

    if mode == "stall":
        from stall import measure

        measure(gb, directory, options["rounds"], options["seed"], emit)
    else:
        train_until_signalled(mode, gb, directory, emit)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()

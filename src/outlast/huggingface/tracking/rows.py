"""Names of values in the rows that a Trainer's callbacks for W&B and Trackio log."""

from transformers.integrations.integration_utils import rewrite_logs

STEP = "train/global_step"
"""The name under which they log the optimizer step."""
SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
"""What is in no row: W&B's summary has it, Trackio nothing."""


def named(key: str) -> str:
    """Return the name of a value that the Trainer calls `key`."""
    return key if key in SUMMARY else str(next(iter(rewrite_logs({key: 0}))))

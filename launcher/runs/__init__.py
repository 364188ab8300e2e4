"""Runs read back: where they stand, what Slurm says of them, and what came of them."""

"""Hydra YAML: every knob, nothing else."""

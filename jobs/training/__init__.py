"""Holds what the kinds of job share: models, data, trainer arguments, DeepSpeed."""

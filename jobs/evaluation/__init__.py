"""This room scores the checkpoints of a run that has been trained here, one after the other."""

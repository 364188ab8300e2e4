"""A checkpoint is either sealed or absent: how it is written, verified, kept within the budget and removed."""

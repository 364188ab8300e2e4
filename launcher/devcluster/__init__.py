"""A real Slurm on one machine."""

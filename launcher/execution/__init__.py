"""A plan carried out, here or on Slurm."""

"""Configuration templates of the one-machine Slurm."""

"""What the library knows of Slurm: it names no `SLURM_*` variable and runs no Slurm command outside this room."""

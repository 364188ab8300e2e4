"""The only room that knows Slurm: no `SLURM_*` name and no Slurm command stands outside it."""

# Sourced by every job's batch script, before `srun`. Site settings (modules, environment) go into a file of your own,
# named by OUTLAST_SITE_PROLOGUE. A script that sources this runs `outlast.epilogue` when its ranks are gone: see
# train.sbatch.

# A signal to the batch shell must not end it while its ranks are saving.
trap : TERM USR1 USR2

if [ -n "${OUTLAST_SITE_PROLOGUE:-}" ]; then
    . "$OUTLAST_SITE_PROLOGUE"
fi

# With `sbatch --export=NONE`, NIL or a list of names, `srun` would keep from the ranks what this script has set up, the
# PATH included. `--export` is about the submitter's environment; what a rank gets is this script's.
export SLURM_EXPORT_ENV=ALL PATH HOME="${HOME:-$(echo ~)}"

# Hold signals back in a rank until its guard is in place: they stay pending instead of killing an interpreter that is
# still starting. `env --block-signal` is in GNU coreutils 8.31 and later; without it that first half second is open.
OUTLAST_HOLD=(env)
if env --block-signal=TERM,USR1,USR2 true 2>/dev/null; then
    OUTLAST_HOLD=(env --block-signal=TERM,USR1,USR2)
fi

# This job is the run's own: its ranks may requeue it, and leave to `outlast.epilogue` what they can't know.
export OUTLAST_BATCH_JOB="${SLURM_JOB_ID:-}"

# Since Slurm 22.05 `srun` no longer takes over what the job asked for: without this each rank is bound to one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
fi

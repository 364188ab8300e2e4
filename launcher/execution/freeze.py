"""A plan written into its run directory, from which every attempt reads it."""

from outlast.config.configuration import dump, load
from outlast.deletion import delete
from outlast.errors import ConfigError
from outlast.files import to_json, write_atomically
from outlast.rundir import ancestry
from outlast.rundir.directory import RunDirectory

from ..planning.plan import Plan, check_run_directory
from .fork import carry_over


def freeze(plan: Plan) -> RunDirectory:
    """Write the plan and its configuration into the run directory.

    The caller holds the run's lock, or knows that no job of it is queued: an attempt under way keeps what it has.

    Raises:
        ConfigError: the directory holds another run, or can't be written.
    """
    check_run_directory(plan)
    run = plan.directory
    try:
        run.create()
        if run.config.exists() and plan.config.differences(load(run.config)):
            for path in ancestry.own_preparations(run):  # of what the run was before it had a checkpoint
                delete(path, inside=run.path)
        if plan.fork is not None:
            carry_over(plan.fork, run)
        write_atomically(run.plan, to_json(plan.as_dict(), indent=1), private=True)
        write_atomically(run.config, dump(plan.config), private=True)
    except OSError as error:
        raise _unwritable(run, error) from None
    return run


def make_run_directory(run: RunDirectory) -> None:
    """Make the run directory, for its lock.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        run.create()
    except OSError as error:
        raise _unwritable(run, error) from None


def _unwritable(run: RunDirectory, error: OSError) -> ConfigError:
    return ConfigError("run.root", str(run.path.parent), f"{error.filename}: {error.strerror}")

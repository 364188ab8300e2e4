"""The batch script of a job or a job array: submitit renders the header, what runs is outlast's own.

One script serves every attempt, and every cell of an array. It contains no pickle and needs none: a rank finds all it
has to know in its run directory.
"""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from outlast.config.cluster import SlurmCluster
from outlast.config.configuration import Config
from outlast.errors import ConfigError, SlurmError
from outlast.files import read_json
from outlast.processes import python_module_command

OWNED = (
    "requeue", "no-requeue", "open-mode", "signal", "output", "error", "nodes", "ntasks-per-node", "cpus-per-task",
    "array", "job-name", "time", "parsable", "test-only", "wait",
)  # fmt: skip
"""Flags of `sbatch` that outlast sets itself."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a batch script runs."""

    name: str
    """The job's."""
    directory: Path
    """The run's, or the sweep's."""
    code: Path
    """The snapshot that runs."""
    sweep: bool = False
    offset: int = 0
    """For a sweep: a cell's index less its task in the array."""

    @property
    def arguments(self) -> list[str]:
        """What `outlast.rank` and `outlast.epilogue` are told."""
        if not self.sweep:
            return [str(self.directory)]
        return ["--sweep", str(self.directory), *(["--offset", str(self.offset)] if self.offset else [])]

    @property
    def log(self) -> Path:
        """The log of the batch script and of what `srun` prints, with Slurm's `%` patterns."""
        return self.directory / "logs" / ("%A_%a.log" if self.sweep else "%j.log")


def target_of(config: Config) -> Target:
    """What the batch script of a single run runs."""
    return Target(name=config.run.name or "", directory=config.directory, code=config.directory / "code")


def batch_script(config: Config, target: Target) -> str:
    """The text of the script.

    Raises:
        ConfigError: a flag or a path that a batch script can't have.
        SlurmError: there is no Slurm here.
    """
    cluster = config.cluster
    assert isinstance(cluster, SlurmCluster)
    if "\\" in str(target.directory) or "\n" in str(target.directory):
        raise ConfigError("run.root", str(target.directory), "Slurm takes no backslash and no newline in a log's path")
    hold = ["srun", "--unbuffered", "--kill-on-bad-exit=1", *_flags("srun", cluster.srun)]
    rank = shlex.join(["outlast.rank", *target.arguments])
    epilogue = shlex.join(["outlast.epilogue", *target.arguments, "--exit-code"])
    path = shlex.quote(pythonpath(target.code))
    lines = [
        *_setup(cluster.setup, f'PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"', epilogue),
        f"export OMP_NUM_THREADS={config.parallel.cpus_per_rank}",
        f". {shlex.quote(str(_prologue(target.code)))}",
        "# The code that was frozen at submission comes before what is installed.",
        f'export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        shell_python(),
        "",
        "code=0",
        f'{shlex.join(hold)} "${{OUTLAST_HOLD[@]}}" "${{python[@]}}" {rank} || code=$?',
        "# What the ranks can't see to when they are gone; its exit code is the job's.",
        f'"${{python[@]}}" {epilogue} "$code"',
    ]
    header = _header(config, target)
    return f"{header}\n\n" + "\n".join(lines) + "\n"


def _setup(lines: list[str], environment: str, epilogue: str) -> list[str]:
    """The lines of `cluster.setup`; one that fails ends the job, and the run's ledger says which.

    Args:
        environment: an assignment before a command, so that it runs the frozen code.
        epilogue: what is told then, up to the exit code.
    """
    if not lines:
        return []
    units = lines if all(map(_stands_alone, lines)) else ["\n".join(lines)]
    return [
        "setup_failed() {",
        '    code=$? why="cluster.setup: exit code $? of: $setup"',
        '    echo "[outlast] $why"',
        f'    {environment} {shlex.join(python_module_command())} {epilogue} "$code" --before "$why"',
        "    exit $?",
        "}",
        "trap setup_failed EXIT",
        *(
            line
            for unit in units
            for line in (f"setup={shlex.quote(unit)}", unit, "code=$?; [ $code = 0 ] || exit $code")
        ),
        "trap - EXIT",
        "",
    ]


def _stands_alone(line: str) -> bool:
    """Whether a line is a whole command. `if` or a here-document goes on in the next one."""
    checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True)
    return not (checked.returncode or checked.stderr or line.rstrip("\n").endswith("\\"))


def pythonpath(target: Path) -> str:
    """What `PYTHONPATH` must begin with for the snapshot in `target` to be what is imported."""
    project = target / "project"
    recorded = read_json(target / "code.json") or {}
    places = [target]
    if recorded.get("project") is not None:
        places += [
            place for place in (project / recorded["project"]["prefix"], project, project / "src") if place.is_dir()
        ]
    return ":".join(dict.fromkeys(os.path.normpath(place.absolute()) for place in places))


def shell_file(name: str) -> Path:
    """A file of the `slurm` room, where it is installed."""
    return Path(str(resources.files("outlast.shell"))) / name


def shell_python() -> str:
    """The line of a batch script after which `"${python[@]}" MODULE` runs a module."""
    return f"python=({shlex.join(python_module_command())})"


def _prologue(code: Path) -> Path:
    """Name the frozen prologue; before there is a snapshot (`outlast plan`), where it will be."""
    return code / "outlast" / "shell" / shell_file("prologue.sh").name


def _header(config: Config, target: Target) -> str:
    """The `#SBATCH` lines, by submitit, which also refuses parameters that it does not know."""
    from submitit import SlurmExecutor

    cluster, parallel, preemption = config.cluster, config.parallel, config.preemption
    assert isinstance(cluster, SlurmCluster)
    if shutil.which("srun") is None:  # submitit asks the same, and raises a RuntimeError
        raise SlurmError("there is no Slurm on this machine (no `srun` on the PATH)")
    executor = SlurmExecutor(folder=target.directory / "logs")
    agents = parallel.launch == "accelerate"  # one task per node, which starts the node's ranks
    optional = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "mem": f"{int(cluster.mem_gb * 1000)}M" if cluster.mem_gb else None,
        "constraint": cluster.constraint,
        "nodelist": cluster.nodelist,
        "exclude": cluster.exclude,
        "gpus_per_node": parallel.gpus_per_rank * parallel.ranks_per_node or None,
    }
    executor.update_parameters(
        **{name: value for name, value in optional.items() if value is not None},
        job_name=target.name,
        time=cluster.time_min,
        nodes=parallel.nodes,
        ntasks_per_node=1 if agents else parallel.ranks_per_node,
        cpus_per_task=parallel.cpus_per_rank * (parallel.ranks_per_node if agents else 1),
        stderr_to_stdout=True,
        wckey=None,  # submitit's own would be refused where such keys are enforced
        additional_parameters={
            "requeue": True,
            "signal": f"{preemption.signal}@{preemption.lead_s}",
            "output": str(target.log.parent).replace("%", "%%") + f"/{target.log.name}",
            **_checked("sbatch", cluster.sbatch),
        },
    )
    text = str(executor._make_submission_file_text("", "plan"))
    return text.partition("\n\n# command")[0]


def _checked(command: str, flags: dict[str, object]) -> dict[str, object]:
    """Flags without those that are switched off.

    Raises:
        ConfigError: one that outlast sets itself, or whose value is no text, number or truth.
    """
    for flag, value in flags.items():
        key = f"cluster.{command}.{flag}"
        if command == "sbatch" and flag.replace("_", "-") in OWNED:
            raise ConfigError(key, value, "outlast sets this flag itself")
        if not isinstance(value, str | int | float | None):
            raise ConfigError(key, value, "valid: a text, a number, or true for a flag without a value")
        if "\n" in f"{flag}{value}" or not flag.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(key, value, "valid: one line; the flag's name without the dashes")
    return {flag: value for flag, value in flags.items() if value is not None and value is not False}


def _flags(command: str, flags: dict[str, object]) -> list[str]:
    checked = {flag.replace("_", "-"): value for flag, value in _checked(command, flags).items()}
    return [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in checked.items()]

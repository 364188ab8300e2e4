"""The `outlast` command. Each subcommand imports what it needs, so that those which plan no job start fast."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from outlast.errors import Exit, OutlastError
from outlast.ledger import Ledger, finished

OVERRIDES = "a Hydra override: model=pretrained picks a group's file, seed=3 sets a key; trainer.* is TRL's SFTConfig"


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="outlast",
        description="Fine-tuning jobs that outlast preemption on Slurm.",
        epilog="exit codes: 0 done, 1 failed, 2 refused, 75 stopped early and saved (resume me), 93 gave up",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help, description=help, epilog=f"example:\n  {example}", formatter_class=formatter
        )

    def overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDES)
        sub.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="a directory of your own groups and experiments"
        )

    train = command(
        "train",
        "Plan a run, then train here (cluster=local) or submit it",
        "outlast train run.name=first trainer.max_steps=200",
    )
    overrides(train)
    plan = command(
        "plan", "Print what train would decide; start nothing", "outlast plan cluster=slurm parallel.nodes=2"
    )
    overrides(plan)
    plan.add_argument("--json", action="store_true")
    prepare = command(
        "prepare", "Make the run directory and print its path (for batch scripts)", "outlast prepare run.name=first"
    )
    overrides(prepare)
    prepare.add_argument("--prologue", action="store_true", help="print the path of prologue.sh instead")

    status = command(
        "status", "Runs: state, step, attempts, checkpoint age, bytes of budget", "outlast status --root runs"
    )
    status.add_argument("--root", type=Path, default=Path("runs"), help="where the run directories are (default: runs)")
    status.add_argument("--json", action="store_true")
    report = command("report", "What happened to a run: attempts, causes, steps lost, goodput", "outlast report first")
    report.add_argument("run", metavar="RUN", help="a run's name under --root, or its directory")
    report.add_argument("--root", type=Path, default=Path("runs"))
    report.add_argument("--json", action="store_true")

    dev = command(
        "devcluster", "A real Slurm on this machine (root, Debian's packages)", "outlast devcluster up --grace 30"
    )
    verbs = dev.add_subparsers(dest="verb", required=True, metavar="up|down|status")
    up = verbs.add_parser("up", help="start it: four nodes, partitions low and high")
    up.add_argument(
        "--grace", type=int, default=30, metavar="S", help="seconds from preemption to the kill (default: 30)"
    )
    up.add_argument(
        "--user-signal",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="send the job's --signal at preemption",
    )
    up.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB, so that sacct works")
    down = verbs.add_parser("down", help="stop it, with every process it started")
    shown = verbs.add_parser("status", help="nodes and options")
    shown.add_argument("--env", action="store_true", help="print the export that points Slurm's commands at it")
    shown.add_argument("--json", action="store_true")
    for verb in (up, down, shown):
        verb.add_argument(
            "--dir", type=Path, default=None, help="its directory (default: ~/.local/state/outlast/devcluster)"
        )
    return parser


def main() -> None:
    """Entry point of the console command."""
    arguments = _parser().parse_args()
    try:
        sys.exit(_run(arguments))
    except OutlastError as error:
        print(f"outlast: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(Exit.FAILED)


def _run(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "status":
            from . import status

            return status.main(arguments.root, as_json=arguments.json)
        case "report":
            from . import report

            return report.main(arguments.run, arguments.root, as_json=arguments.json)
        case "devcluster":
            return _devcluster(arguments)
    from . import plan as planning
    from .compose import compose

    if arguments.command == "prepare" and arguments.prologue:
        print(planning.shell_file("prologue.sh"))
        return Exit.DONE
    plan = planning.make(compose(arguments.overrides, config_dir=arguments.config_dir))
    match arguments.command:
        case "plan":
            return _print_plan(plan, as_json=arguments.json)
        case "prepare":
            print(planning.freeze(plan).path)
            return Exit.DONE
    run = planning.freeze(plan)
    if done := finished(Ledger(run.ledger).read()):
        print(f"{run.path} has finished already, at step {done['step']}; its model is in {run.final}")
        return Exit.DONE
    if plan.config.cluster.kind == "local":
        from . import local

        return local.train(plan)
    from .submit import submit

    job = submit(plan)
    name, root = plan.config.run.name, plan.config.run.root
    print(f"job {job.job_id} is in the queue already" if job.again else f"submitted job {job.job_id}")
    print(f"  run     {plan.directory.path}\n  log     {job.log}")
    print(f"  status  outlast status --root {root}\n  report  outlast report {name} --root {root}")
    print(f"  cancel  scancel {job.job_id}")
    return Exit.DONE


def _print_plan(plan: "object", *, as_json: bool) -> int:
    from .plan import Plan

    assert isinstance(plan, Plan)
    values = plan.as_dict()
    if as_json:
        print(json.dumps(values, indent=1))
        return Exit.DONE
    script = values.pop("script")
    for key, value in values.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value or "none"
        print(f"{key:10} {shown}")
    if script:
        print("script\n" + "\n".join(f"    {line}" for line in script.splitlines()))
    return Exit.DONE


def _devcluster(arguments: argparse.Namespace) -> int:
    from . import devcluster

    directory = arguments.dir or devcluster.default_directory()
    match arguments.verb:
        case "up":
            devcluster.up(
                directory, grace_s=arguments.grace, user_signal=arguments.user_signal, accounting=arguments.accounting
            )
        case "down":
            devcluster.down(directory)
        case "status" if arguments.env:
            print("\n".join(f"export {name}={value}" for name, value in devcluster.env(directory).items()))
        case _:
            shown = devcluster.status(directory)
            print(json.dumps(asdict(shown), default=str, indent=1) if arguments.json else devcluster.describe(shown))
    return Exit.DONE

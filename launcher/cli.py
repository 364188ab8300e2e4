"""The `outlast` command. Each subcommand imports what it needs, so that those which plan no job start fast."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from outlast.errors import Exit, OutlastError

from .arguments import parser


def main() -> None:
    """Entry point of the console command."""
    arguments = parser().parse_args()
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
            from .commands import status

            states = status.states_named(arguments.state) if arguments.state else None
            shown = {"states": states, "watch_s": arguments.watch, "as_json": arguments.json}
            return status.main(arguments.runs, arguments.root, **shown)
        case "logs":
            from .commands import logs

            chosen = {"attempt": arguments.attempt, "rank": arguments.rank, "job": arguments.job}
            return logs.main(arguments.run, arguments.root, **chosen, follow=arguments.follow, lines=arguments.lines)
        case "cancel":
            from .commands import cancel

            return cancel.main(arguments.runs, arguments.root, everything=arguments.all, sure=arguments.yes)
        case "resume":
            from .commands import resume

            return resume.main(arguments.runs, arguments.root)
        case "report":
            from .commands import report

            return report.main(arguments.run, arguments.root, as_json=arguments.json)
        case "checkpoints":
            from .commands import checkpoints

            return checkpoints.main(arguments.run, arguments.root, verify=arguments.verify, as_json=arguments.json)
        case "devcluster":
            return _devcluster(arguments)
        case "prepare":
            return _prepare(arguments)
    from .commands import train

    chosen = {"as_json": arguments.json}
    if arguments.command == "plan":
        return train.plan(arguments.overrides, arguments.config_dir, sweep=arguments.multirun, **chosen)
    command = train.train_sweep if arguments.multirun else train.train
    return command(arguments.overrides, arguments.config_dir, waiting=arguments.wait, **chosen)


def _prepare(arguments: argparse.Namespace) -> int:
    from .planning import plan as planning
    from .planning.compose import compose

    if arguments.prologue:
        print(f". {shlex.quote(str(planning.shell_file('prologue.sh')))}; python={shlex.quote(sys.executable)}")
    elif arguments.multirun:
        from .execution import sweep

        cells = sweep.make(arguments.overrides, config_dir=arguments.config_dir)
        print(sweep.prepare(cells, arguments.cell).path)
    else:
        plan = planning.make(compose(arguments.overrides, config_dir=arguments.config_dir))
        print(planning.freeze(plan).path)
    return Exit.DONE


def _devcluster(arguments: argparse.Namespace) -> int:
    from .devcluster import cluster as devcluster

    directory = arguments.dir or devcluster.default_directory()
    match arguments.verb:
        case "up":
            devcluster.up(
                directory, grace_s=arguments.grace, user_signal=arguments.user_signal, accounting=arguments.accounting
            )
        case "down":
            devcluster.down(directory)
        case "status" if arguments.env:
            names = {**devcluster.env(directory), "OUTLAST_DEVCLUSTER": str(directory)}
            print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in names.items()))
        case _:
            shown = devcluster.status(directory)
            print(json.dumps(asdict(shown), default=str, indent=1) if arguments.json else devcluster.describe(shown))
    return Exit.DONE

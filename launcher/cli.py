"""The `outlast` command. Each subcommand imports what it needs, so that those which plan no job start fast."""

import argparse
import errno
import sys

from outlast.errors import Exit, OutlastError, denied

from .arguments import parser


def main() -> None:
    """Entry point of the console command."""
    arguments = parser().parse_args()
    try:
        sys.exit(_run(arguments))
    except OutlastError as error:
        print(f"outlast: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except PermissionError as error:
        print(f"outlast: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(Exit.REFUSED)
    except BrokenPipeError:
        sys.exit(Exit.FAILED)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"outlast: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(Exit.REFUSED)
        if (text := denied(error)) is None:
            raise
        print(f"outlast: {text}", file=sys.stderr)
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
        case "prune":
            from .commands import prune

            names = ("older", "keep", "unfinished", "dry_run")
            rule = {name: getattr(arguments, name) for name in names}
            return prune.main(arguments.runs, arguments.root, **rule, sure=arguments.yes, as_json=arguments.json)
        case "move":
            from .commands import move

            return move.main(arguments.run, arguments.to, arguments.root)
        case "plan":
            from .commands import plan

            sweep, as_json = arguments.multirun, arguments.json
            return plan.main(arguments.overrides, arguments.config_dir, sweep=sweep, as_json=as_json)
        case "prepare":
            from .commands import prepare

            if arguments.prologue:
                return prepare.prologue()
            sweep, cell = arguments.multirun, arguments.cell
            return prepare.main(arguments.overrides, arguments.config_dir, sweep=sweep, cell=cell)
        case "devcluster":
            return _devcluster(arguments)
    from .commands import train

    command = train.train_sweep if arguments.multirun else train.train
    return command(arguments.overrides, arguments.config_dir, waiting=arguments.wait, as_json=arguments.json)


def _devcluster(arguments: argparse.Namespace) -> int:
    from .commands import devcluster

    match arguments.verb:
        case "up":
            options = {"grace_s": arguments.grace, "user_signal": arguments.user_signal}
            return devcluster.up(arguments.dir, **options, accounting=arguments.accounting)
        case "down":
            return devcluster.down(arguments.dir)
        case _:
            return devcluster.status(arguments.dir, env=arguments.env, as_json=arguments.json)

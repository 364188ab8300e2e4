"""The `outlast` command. Each subcommand imports what it needs, so that those which plan no job start fast."""

import argparse
import errno
import sys
from typing import Any

from outlast.errors import ConfigError, Exit, OutlastError, denied

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
        if error.filename is None:
            raise
        print(f"outlast: {denied(error) or f'{error.filename}: {error.strerror}'}", file=sys.stderr)
        sys.exit(Exit.REFUSED if error.errno == errno.ENAMETOOLONG else Exit.FAILED)


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

            files = {kind: getattr(arguments, kind) for kind in ("html", "svg", "png")}
            how = {"files": files, "sort": arguments.sort, "since": arguments.since}
            return report.main(arguments.run, arguments.root, as_json=arguments.json, **how)
        case "checkpoints":
            from .commands import checkpoints

            return checkpoints.main(arguments.run, arguments.root, verify=arguments.verify, as_json=arguments.json)
        case "export":
            from .commands import export

            options = {"merge": arguments.merge, "dtype": arguments.dtype, "as_json": arguments.json}
            return export.main(arguments.run, arguments.root, arguments.to, arguments.checkpoint, **options)
        case "evaluate":
            from .commands import evaluate

            return evaluate.main(arguments.run, arguments.root, arguments.data, as_json=arguments.json)
        case "try":
            from .commands import try_

            options = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed", "plain")}
            prompt, which = arguments.prompt, arguments.checkpoint
            return try_.main(arguments.run, arguments.root, prompt, which, **options, as_json=arguments.json)
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

    train_options: dict[str, Any] = {"waiting": arguments.wait, "as_json": arguments.json}
    if arguments.optimizer and arguments.begin_with is None:
        raise ConfigError("--optimizer", True, "valid: with --from RUN")
    if not arguments.multirun:
        train_options |= {"begin_with": arguments.begin_with, "optimizer": arguments.optimizer}
        return train.train(arguments.overrides, arguments.config_dir, **train_options)
    if arguments.begin_with is not None:
        raise ConfigError("--from", arguments.begin_with, "valid: for one run, without -m")
    return train.train_sweep(arguments.overrides, arguments.config_dir, **train_options)


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

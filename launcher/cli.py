"""The `outlast` command. Each subcommand imports what it needs, so that those which plan no job start fast."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from outlast.errors import Exit, OutlastError
from outlast.ledger import Ledger, finished

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
            from . import status

            return status.main(arguments.root, as_json=arguments.json)
        case "report":
            from . import report

            return report.main(arguments.run, arguments.root, as_json=arguments.json)
        case "checkpoints":
            from . import checkpoints

            return checkpoints.main(arguments.run, arguments.root, verify=arguments.verify, as_json=arguments.json)
        case "devcluster":
            return _devcluster(arguments)
    from . import plan as planning
    from .compose import compose

    if arguments.command == "prepare" and arguments.prologue:
        print(f". {shlex.quote(str(planning.shell_file('prologue.sh')))}; python={shlex.quote(sys.executable)}")
        return Exit.DONE
    plan = planning.make(compose(arguments.overrides, config_dir=arguments.config_dir))
    match arguments.command:
        case "plan":
            return _print_plan(plan, as_json=arguments.json)
        case "prepare":
            print(planning.freeze(plan).path)
            return Exit.DONE
    planning.check_directory(plan)
    run = plan.directory
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
    values["checkpoint"] = values["checkpoint"]["explanation"]
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

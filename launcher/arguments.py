"""The commands, their flags and their help."""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

OVERRIDES = "a Hydra override: model=pretrained picks a group's file, seed=3 sets a key; trainer.* is TRL's SFTConfig"
SWEEP = "a sweep, as one job array: seed=1,2 and trainer.learning_rate=1e-4,3e-4 make four cells; range(1,4), glob(*)"
RUN = "a run's name under --root, or its directory"
RUNS = "runs, sweeps or SWEEP/CELL under --root, or their directories"
WHICH = "final, best, newest or a step"
FROM = (
    "a new run that begins with another's weights (WHICH: final, best, newest or a step), and has its configuration "
    "but for the overrides; needs run.name"
)
RESOURCES = (
    "cluster.time_min=240 changes a resource (cluster.*, preemption.*, storage.*, checkpoint.*, parallel.nodes, "
    "parallel.ranks_per_node, parallel.launch) or logging and evaluation (trainer.*)"
)
COMPLETION = 'print the shell\'s completion: eval "$(outlast --print-completion bash)" in ~/.bashrc turns it on'
ROOT = "where the run directories are (default: runs)"


class _CommandParser(argparse.ArgumentParser):
    """Parses the arguments of one command, and answers itself for those that it does not know."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        for several in ("overrides", "runs"):  # argparse takes those before an option only, or those behind it
            if hasattr(namespace, several):
                words = [word for word in unknown if not word.startswith("-")]
                setattr(namespace, several, [*getattr(namespace, several), *words])
                unknown = [word for word in unknown if word not in words]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


class _PrintCompletion(argparse.Action):
    """Print what a shell needs to complete `outlast`, and leave."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option_string: str | None = None
    ) -> None:
        import shtab

        print(shtab.complete(parser, shell=values))
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The whole command line of `outlast`."""
    formatter = argparse.RawDescriptionHelpFormatter
    root = argparse.ArgumentParser(
        prog="outlast",
        description="Fine-tuning jobs that outlast preemption on Slurm.",
        epilog="exit codes: 0 done, 1 failed, 2 refused, 75 stopped early and saved (resume me), 93 gave up",
    )
    root.add_argument("--version", action="version", version=f"outlast {version('outlast')}")
    root.add_argument("--print-completion", action=_PrintCompletion, choices=["bash", "zsh"], help=COMPLETION)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)

    def command(name: str, help: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help, description=help, epilog=f"example:\n  {example}", formatter_class=formatter
        )

    def overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDES)
        sub.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="a directory of your own groups and experiments"
        )

    def sweep(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("-m", "--multirun", action="store_true", help=SWEEP)

    train = command(
        "train",
        "Plan a run, then train here (cluster=local) or submit it",
        "outlast train run.name=first trainer.max_steps=200",
    )
    overrides(train)
    sweep(train)
    train.add_argument("--wait", action="store_true", help="come back when it has ended, and say what came of it")
    train.add_argument("--from", dest="begin_with", metavar="RUN[@WHICH]", help=FROM)
    train.add_argument(
        "--optimizer", action="store_true", help="with --from: take over optimizer, schedule and position, too"
    )
    train.add_argument("--json", action="store_true", help="wait, and print state and metric of each cell as JSON")
    plan = command(
        "plan", "Print what train would decide; start nothing", "outlast plan cluster=slurm parallel.nodes=2"
    )
    overrides(plan)
    sweep(plan)
    plan.add_argument("--json", action="store_true")
    prepare = command(
        "prepare", "Make the run directory and print its path (for batch scripts)", "outlast prepare run.name=first"
    )
    overrides(prepare)
    sweep(prepare)
    prepare.add_argument("--cell", type=int, default=0, metavar="N", help="of a sweep (-m): this cell, from 0")
    prepare.add_argument("--prologue", action="store_true", help="print a batch script's first lines")

    status = command(
        "status",
        "Runs: state, step, attempts, checkpoint age, bytes of budget",
        "outlast status --state failed,running",
    )
    status.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUNS} (default: all)")
    status.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    status.add_argument("--state", metavar="STATE,…", help="only runs in these states, such as failed,running")
    shown_as = status.add_mutually_exclusive_group()
    shown_as.add_argument(
        "--watch", nargs="?", type=float, const=5.0, metavar="S", help="show it anew every S seconds (default: 5)"
    )
    shown_as.add_argument("--json", action="store_true")
    logs = command("logs", "What a run's ranks print", "outlast logs first --follow")
    logs.add_argument("run", metavar="RUN", help=RUN)
    logs.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    logs.add_argument(
        "-f", "--follow", action="store_true", help="go on with what is added, into the next attempts too"
    )
    logs.add_argument("--attempt", type=int, metavar="N", help="of this attempt (default: the newest)")
    logs.add_argument("--rank", type=int, metavar="R", help="of this rank (default: the one that failed, or 0)")
    logs.add_argument("--job", action="store_true", help="the batch job's own log")
    logs.add_argument("-n", type=int, default=100, dest="lines", metavar="LINES", help="the last LINES (100); 0: all")
    cancel = command(
        "cancel", "Save, stop and stay stopped; take out of the queue", "outlast cancel first lr-sweep/lr=0.1"
    )
    cancel.add_argument("runs", nargs="*", metavar="RUN", help=RUNS)
    cancel.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    cancel.add_argument("--all", action="store_true", help="every run under --root; asks first")
    cancel.add_argument("--yes", action="store_true", help="with --all: don't ask")
    resume = command(
        "resume", "Submit again (or go on with, here) what is unfinished", "outlast resume first cluster.time_min=240"
    )
    resume.add_argument("runs", nargs="+", metavar="RUN|OVERRIDE", help=f"{RUNS}; {RESOURCES}")
    resume.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    checkpoints = command(
        "checkpoints", "A run's checkpoints: kind, state, metric, bytes, age", "outlast checkpoints first --verify"
    )
    checkpoints.add_argument("run", metavar="RUN", help=RUN)
    checkpoints.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    checkpoints.add_argument(
        "--verify", action="store_true", help="read every file and compare its digest; exit code 1 if one differs"
    )
    checkpoints.add_argument("--json", action="store_true")
    prune = command(
        "prune",
        "Free space in runs that have ended: checkpoints by rule, what did not verify, leftovers",
        "outlast prune --older 30d --keep final,best --dry-run\n  outlast prune lr-sweep --yes",
    )
    prune.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUNS} (default: all)")
    prune.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    prune.add_argument("--older", metavar="TIME", help="only runs that ended so long ago: 90min, 12h, 30d, 4w")
    prune.add_argument(
        "--keep",
        default="final,best,newest",
        metavar="WHAT,…",
        help="what stays: best, newest (default: both); final/ always does, and what an unfinished run resumes from",
    )
    prune.add_argument(
        "--unfinished", action="store_true", help="with RUN and --older: that too, so that it can't be resumed"
    )
    prune.add_argument("--dry-run", action="store_true", help="show what would go, and delete nothing")
    prune.add_argument("--yes", action="store_true", help="don't ask")
    prune.add_argument("--json", action="store_true", help="with --dry-run or --yes")
    move = command(
        "move",
        "Move a run that is not under way: copied, verified, then removed where it was",
        "outlast move first /project/runs/first",
    )
    move.add_argument("run", metavar="RUN", help=f"{RUN}, or SWEEP/CELL")
    move.add_argument("to", type=Path, metavar="DEST", help="its new directory, which is not there yet")
    move.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    report = command(
        "report",
        "What happened to a run or a sweep: attempts, causes, seconds, goodput, curves, bytes",
        "outlast report first --html first.html",
    )
    report.add_argument("run", nargs="?", metavar="RUN|SWEEP", help="its name under --root, or its directory")
    report.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    report.add_argument(
        "--sort", metavar="COLUMN", help="of a sweep's table, such as goodput; --sort=-bytes: the largest first"
    )
    report.add_argument(
        "--since", metavar="7d", help="what all runs (or RUN) have cost since then, by user: 12h, 7d, 2w, 2026-11-01"
    )
    report.add_argument("--json", action="store_true")
    for kind, what in (("html", "a page in one file"), ("svg", "the plots"), ("png", "the plots; needs outlast[plot]")):
        report.add_argument(f"--{kind}", nargs="?", const="", metavar="FILE", help=f"{what} (default: RUN.{kind} here)")

    evaluate = command(
        "evaluate",
        "Score every kept checkpoint, light ones too, and say which differences are noise",
        "outlast evaluate first --data other.jsonl",
    )
    evaluate.add_argument("run", metavar="RUN", help=RUN)
    evaluate.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    evaluate.add_argument("--data", type=Path, metavar="FILE", help="JSON Lines (default: the run's evaluation data)")
    evaluate.add_argument("--json", action="store_true")
    export = command(
        "export",
        "A model that from_pretrained or PEFT loads, with tokenizer and model card",
        "outlast export first --to first-model --merge",
    )
    export.add_argument("run", metavar="RUN", help=RUN)
    export.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="a directory that is not there, or empty")
    export.add_argument("--checkpoint", default="final", metavar="WHICH", help=f"{WHICH} (default: final)")
    export.add_argument("--merge", action="store_true", help="merge adapters into their base model")
    export.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="round the weights (default: as they are)"
    )
    export.add_argument("--json", action="store_true")
    tried = command(
        "try", "A few tokens from a run's model, to see whether it learned", 'outlast try first "What does len do?"'
    )
    tried.add_argument("run", metavar="RUN", help=RUN)
    tried.add_argument(
        "prompt", metavar="PROMPT", help="what the user says; put into the chat template, if there is one"
    )
    tried.add_argument("--root", type=Path, default=Path("runs"), help=ROOT)
    tried.add_argument("--checkpoint", metavar="WHICH", help=f"{WHICH} (default: the finished model, else the best)")
    tried.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to generate, at most (64)")
    tried.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="draw tokens (default: 0, always the likeliest)"
    )
    tried.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    tried.add_argument("--plain", action="store_true", help="the prompt as it is, without a chat template")
    tried.add_argument("--json", action="store_true")

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
    return root

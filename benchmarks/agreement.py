"""What it costs, in each step, that ranks can be asked to stop: as built, by a blocking all-reduce, and not at all."""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from children import FOREIGN
from figures import machine
from rich import box
from rich.console import Console
from rich.table import Table

ARMS = ("built", "reduction", "none")
STEP_S = 0.1
GRADIENT = 250_000
"""fp32 values, 1 MB, that the ranks reduce in each step, as data parallel training does."""
LIMIT = 0.001
"""To hold with two ranks: share of a step."""


def rank(options: dict[str, Any]) -> None:
    """One rank: train, time what each arm adds at a step's end, and print a JSON object."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    import torch.distributed as dist

    import outlast

    torch.set_num_threads(1)
    run = outlast.start(options["directory"], every=10**9)
    dist.init_process_group("gloo")
    run.resume_point()
    run.begin(0)
    (channel,) = (thread for thread in threading.enumerate() if thread.name == "outlast-control-channel")
    assert channel.ident is not None
    clock = time.pthread_getcpuclockid(channel.ident)
    arms = {
        "built": lambda step: run.steps.should_stop(step),
        "reduction": lambda step: run.collectives.maximum(0),
        "none": lambda step: None,
    }
    order = list(ARMS) * options["rounds"]
    random.Random(options["seed"]).shuffle(order)
    work, gradient = torch.randn(256, 256), torch.zeros(GRADIENT)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    began, began_cpu = time.perf_counter(), time.clock_gettime(clock)
    for step, arm in enumerate(["none"] * 5 + order):
        until = time.perf_counter() + STEP_S
        while time.perf_counter() < until:
            work = torch.tanh(work @ work)
        dist.all_reduce(gradient)
        before = time.perf_counter()
        arms[arm](step)
        if step >= 5:
            seconds[arm].append(time.perf_counter() - before)
    share = (time.clock_gettime(clock) - began_cpu) / (time.perf_counter() - began)
    found = run.collectives.from_all((seconds, share))
    if run.rank == 0:
        print(json.dumps({"seconds": [one for one, _ in found], "thread_share": [one for _, one in found]}))
    run.finish(0)


def measure(ranks: int, rounds: int, seed: int) -> dict[str, Any]:
    """Start the ranks; by arm, the median over all of their steps."""
    with tempfile.TemporaryDirectory(prefix=".outlast-benchmark-") as directory:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = json.dumps({"directory": str(Path(directory) / "run"), "rounds": rounds, "seed": seed})
        clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        clean |= {"OMP_NUM_THREADS": "1"}
        processes = []
        try:
            for number in range(ranks):
                command = [sys.executable, __file__, "--rank", options]
                env = clean | {"RANK": str(number), "LOCAL_RANK": str(number)}
                pipe = subprocess.PIPE
                processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env))
            assert processes[0].stdout is not None
            lines = list(processes[0].stdout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    found = json.loads(next(line for line in lines if line.startswith("{")))
    arms = {}
    for arm in ARMS:
        values = [value for one in found["seconds"] for value in one[arm]]
        arms[arm] = {
            "median_ms": 1e3 * median(values),
            "p99_ms": 1e3 * sorted(values)[int(0.99 * len(values))],
            "share": median(values) / STEP_S,
        }
    return {"ranks": ranks, "arms": arms, "thread_share": max(found["thread_share"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=100, help="steps of each arm")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank(json.loads(arguments.rank))
        return 0
    here = machine(Path(tempfile.gettempdir()))
    found = [measure(ranks, arguments.rounds, arguments.seed) for ranks in arguments.ranks]
    report = {"machine": here, "step_s": STEP_S, "rounds": arguments.rounds, "seed": arguments.seed, "found": found}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("ranks", "arm", "median ms", "99 % ms", "% of a step"):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for one in found:
            for arm, values in one["arms"].items():
                share = f"{100 * values['share']:.4f}"
                table.add_row(str(one["ranks"]), arm, f"{values['median_ms']:.4f}", f"{values['p99_ms']:.4f}", share)
            table.add_row(str(one["ranks"]), "its thread", "", "", f"{100 * one['thread_share']:.4f} of a core")
        Console().print(f"seed {arguments.seed}, load before {here['load_before']}, {here['cores']} cores", table)
    two = [one for one in found if one["ranks"] == 2]
    return int(any(one["arms"]["built"]["share"] >= LIMIT for one in two))


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())

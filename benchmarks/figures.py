"""From measured values to figures: the machine, medians and ratios, the table."""

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

PACKAGES = ("outlast", "torch", "transformers", "safetensors")
ARMS = ("sealed", "trainer", "flushed", "plain", "direct")


def machine(directory: Path) -> dict[str, Any]:
    """What the figures depend on."""
    mounts = [p for p in psutil.disk_partitions(all=True) if directory.is_relative_to(p.mountpoint)]
    mount = max(mounts, key=lambda p: len(p.mountpoint))
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "file_system": f"{mount.fstype} on {mount.device}",
        "directory": str(directory),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by arm, and ratios: of the medians, and of the values of each round with the median of those.

    Args:
        lines: what `stall.measure` reported of each arm in each round, the warm-up left out.
    """
    arms: dict[str, Any] = {}
    for arm in (name for name in ARMS if name in {line["arm"] for line in lines}):
        own = sorted((line for line in lines if line["arm"] == arm), key=lambda line: line["round"])
        seconds = [line["seconds"] for line in own]
        arms[arm] = {
            "bytes": own[-1]["bytes"],
            "seconds": seconds,
            "median_s": median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "gb_per_s": own[-1]["bytes"] / 1e9 / median(seconds),
        }
        if "ledger_stall_s" in own[0]:
            arms[arm] |= {name: [line[name] for line in own] for name in ("ledger_stall_s", "ledger_sealed_s")}
    ratios = {}
    for under in ARMS[1:]:
        if under in arms:
            pairs = [a / b for a, b in zip(arms["sealed"]["seconds"], arms[under]["seconds"], strict=True)]
            ratios[f"sealed / {under}"] = {
                "of_medians": arms["sealed"]["median_s"] / arms[under]["median_s"],
                "by_round": pairs,
                "median_by_round": median(pairs),
            }
    return {"arms": arms, "ratios": ratios}


def tables(report: dict[str, Any]) -> Group:
    """The report for a terminal."""
    here, stall = report["machine"], report["stall"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    head = Text(
        f"{here['date']}, {here['cores']} cores, {here['memory_gb']} GB, {here['file_system']} ({here['directory']}), "
        f"Linux {here['kernel']}, Python {here['python']}, {versions}, load before {here['load_before']}, "
        f"seed {report['seed']}"
    )
    arms = _table(
        f"Stall of a periodic save, {report['rounds']} round(s)", "arm", "median s", "min", "max", "GB", "GB/s"
    )
    for name, arm in stall["arms"].items():
        values = (arm["median_s"], arm["min_s"], arm["max_s"], arm["bytes"] / 1e9, arm["gb_per_s"])
        arms.add_row(name, *(f"{value:.3f}" for value in values))
    ratios = _table("Ratios of seconds", "ratio", "of medians", "median by round", "rounds")
    for name, ratio in stall["ratios"].items():
        rounds = " ".join(f"{value:.2f}" for value in ratio["by_round"])
        ratios.add_row(name, f"{ratio['of_medians']:.2f}", f"{ratio['median_by_round']:.2f}", rounds)
    leaving = _table("From the signal, s", "by", "saved", "exit", "sealed_s", "steps lost", "code")
    for name, title in (("outlast", "outlast: sealed"), ("jit", "jit: not flushed")):
        rounds = report["shutdown"][name]
        seconds = [_spread(rounds, key) for key in ("saved_s", "exit_s", "ledger_sealed_s")]
        lost = " ".join(str(one["steps_lost"]) for one in rounds)
        codes = " ".join(sorted({str(one["exit_code"]) for one in rounds}))
        leaving.add_row(title, *seconds, lost, codes)
    held = stall["ratios"]["sealed / flushed"]["of_medians"]
    verdict = f"To hold, at about 1 GB: sealed / flushed at most 1.0. Here, at {report['gb']:g} GB: {held:.2f}"
    return Group(head, arms, ratios, leaving, verdict)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _spread(rounds: list[dict[str, Any]], key: str) -> str:
    values = [one[key] for one in rounds if key in one]
    return f"{median(values):.2f}\n{min(values):.2f}-{max(values):.2f}" if values else "-"

"""What a process prints, in processes of its own."""

import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

PRINTS = """
import os
from outlast.processes import ignore_output_errors
ignore_output_errors()
print("before")
os._exit(0)  # nothing is flushed by this
"""


def run(*flags: str, code: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=30)


def test_unbuffered_output_stays_so() -> None:
    assert run("-u", code=PRINTS).stdout == "before\n"


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_line_that_can_not_be_written_is_lost_and_no_more(flags: list[str]) -> None:
    with open("/dev/full", "w") as full:
        assert (
            run(*flags, code=PRINTS.replace("os._exit(0)", "print('after', flush=True)"), stdout=full).returncode == 0
        )


TOGETHER = """
import os
from outlast.processes import ignore_output_errors
ignore_output_errors()
child = os.fork()
for number in range(3000):
    print("one line", number)
if child:
    os.wait()
"""


def test_lines_of_several_processes_are_not_torn(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as log:
        assert run("-u", code=TOGETHER, stdout=log).returncode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == sorted(2 * [f"one line {number}" for number in range(3000)])

"""The command line itself: what every command answers, whatever it is for."""

import os
import subprocess
from importlib.metadata import version

import pytest

from outlast.launcher.arguments import parser

from ..conftest import OUTLAST

COMPLETE = 'source /dev/stdin; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_outlast; echo "${COMPREPLY[@]}"'


@pytest.mark.parametrize("command", ["train", "status", "cancel", "devcluster up"])
def test_a_flag_that_a_command_does_not_have_is_answered_with_the_usage_of_that_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parser().parse_args([*command.split(), "--foo"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: outlast {command} [-h]")
    assert said.endswith(f"outlast {command}: error: unrecognized arguments: --foo\n")


def test_overrides_may_stand_on_both_sides_of_an_option() -> None:
    found = parser().parse_args(["train", "seed=1", "--config-dir", "my", "data=jsonl", "--wait", "job=sft"])
    assert found.overrides == ["seed=1", "data=jsonl", "job=sft"]
    assert found.wait
    assert parser().parse_args(["cancel", "a", "--yes", "b"]).runs == ["a", "b"]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parser().parse_args(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"outlast {version('outlast')}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [(["tra"], "train"), (["logs", "--fol"], "--follow"), (["devcluster", ""], "up down status")],
)
def test_bash_completes(typed: list[str], offered: str) -> None:
    script = subprocess.run([OUTLAST, "--print-completion", "bash"], capture_output=True, check=True, timeout=60).stdout
    command = ["bash", "-c", COMPLETE, "bash", "outlast", *typed]
    done = subprocess.run(command, input=script, capture_output=True, check=True, timeout=60)
    assert done.stdout.decode().split() == offered.split()


def test_zsh_is_served_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--print-completion", "zsh"])
    assert capsys.readouterr().out.startswith("#compdef outlast")


def test_help_takes_less_than_a_third_of_a_second_of_the_processor() -> None:
    before = os.times()
    subprocess.run([OUTLAST, "--help"], check=True, stdout=subprocess.DEVNULL, timeout=60)
    after = os.times()
    spent = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    assert spent < 0.4, "0.25 s on a quiet machine"

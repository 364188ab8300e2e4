"""Sweeps: how overrides become cells, what they are called, and what is refused before anything is written."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from outlast.errors import ConfigError, OutlastError
from outlast.launcher.execution import local_sweep
from outlast.launcher.execution.sweep import make_sweep_directory, prepare_cell
from outlast.launcher.planning.compose import Composer, compose
from outlast.launcher.planning.expand import LONGEST_NAME, expand
from outlast.launcher.planning.sweep import CellsRefusedError, check_cells, merged, plan_sweep
from outlast.launcher.runs.queue import ranges
from outlast.rundir.sweep import SweepManifest, read_sweep_manifest
from outlast.which_run import cell_directory


def names(*overrides: str) -> list[str]:
    return [combination.name for combination in expand(overrides, Composer())[1]]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        expand(overrides, Composer())
    return str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=1,2"], ["seed=1", "seed=2"]),
        (["seed=range(1,4)"], ["seed=1", "seed=2", "seed=3"]),
        (["model=glob(*)"], ["model=pretrained", "model=tiny"]),
        (["model=glob(*,exclude=t*)"], ["model=pretrained"]),
        (["job=smoke", "seed=1"], ["cell"]),
        (["trainer.learning_rate=1e-3,0.1"], ["learning_rate=0.001", "learning_rate=0.1"]),
        (["++trainer.learning_rate=0.1,0.2"], ["learning_rate=0.1", "learning_rate=0.2"]),
        (
            ["seed=1,2", "model=tiny,pretrained"],
            ["seed=1,model=tiny", "seed=1,model=pretrained", "seed=2,model=tiny", "seed=2,model=pretrained"],
        ),
        (["trainer.a.x=1,-1", "trainer.b.x=null"], ["x=1", "x=-1"]),
        (["trainer.a.x=1,-1", "trainer.b.x=null,2"], [f"a.x={a},b.x={b}" for a in (1, -1) for b in ("null", 2)]),
        (["x=1,2", "a.x=3,4"], ["x=1,a.x=3", "x=1,a.x=4", "x=2,a.x=3", "x=2,a.x=4"]),
        (["seed=1,2", "seed=5"], ["cell"]),
        (["seed=5", "seed=1,2"], ["seed=1", "seed=2"]),
        (["data.name='ä',b"], ["name=ä", "name=b"]),
    ],
)  # fmt: skip
def test_cells_and_their_names(overrides: list[str], expected: list[str]) -> None:
    assert names(*overrides) == expected


def test_the_last_override_of_a_key_counts_as_in_hydra() -> None:
    shared, combinations = expand(["seed=1,2", "job=smoke", "seed=5"], Composer())
    assert shared == ["job=smoke", "seed=5"]
    assert [combination.overrides for combination in combinations] == [()]


def test_names_are_safe_unique_and_stay_when_the_sweep_grows() -> None:
    odd = ["'a/b'", "'a b'", "'a,b'", "'$(x)'", "'..'", "'~'", '"it\'s"', "[1,2]", "''"]
    found = names(f"data.path={','.join(odd)}")
    assert len(set(found)) == len(odd)
    for name in found:
        assert not set(name) & set("/%$()'\" ~\\\n*;&|")
        assert name.startswith("path=")
    assert names(f"data.path={','.join(odd[1:3])}") == found[1:3]


def test_a_long_name_is_cut_and_still_tells_cells_apart() -> None:
    first, second = names(f"data.path={'ä' * 200 + 'x'!r},{'ä' * 200 + 'y'!r}")
    assert len(first.encode()) <= LONGEST_NAME
    assert first != second


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=1,1"], "sweep: 'seed=1' is refused; it stands there more than once"),
        (["seed=interval(1,2)"], "an interval has no end of values"),
        (["seed=range(3,1)"], "it has no values"),
        (["seed=range(0,10001)"], "valid: 10000 at most"),
        (["seed=range(0,101)", "trainer.x=range(0,100)"], "it has 10100 cells; valid: 10000 at most"),
        (["model=glob(x*)"], "valid: pretrained, tiny"),
        (["seed=glob(*)"], "picks files of a group, and this is none"),
        (["run.name=a,b"], "it belongs to the sweep"),
        (["run.root=a,b"], "it belongs to the sweep"),
        (["model@x=tiny,pretrained"], "valid: group=a,b"),
        (["seed=1,2", "foo"], "valid: key=value"),
        (["seed=1,(2"], "it does not parse"),
    ],
)
def test_what_can_not_be_expanded_is_refused(overrides: list[str], said: str) -> None:
    assert said in refusal(*overrides)


@pytest.mark.parametrize(
    "cell",
    [
        ["seed=3"],
        ["trainer.learning_rate=0.5", "seed=7"],
        ["model=pretrained", "model.path=/x"],
        ["experiment=demo", "trainer.max_steps=7"],
        ["checkpoint.every=30min"],
        ["cluster.requeue_delay_s=3"],
        ["trainer={max_steps: 9}"],
        ["trainer.packing=true"],
        ["job=smoke", "trainer.something_new=1"],
        ["trainer.logging_steps=${seed}"],
    ],
)
def test_a_cell_is_what_a_single_run_with_its_overrides_would_be(cell: list[str]) -> None:
    composer = Composer()
    composer.compose(["run.name=r"], ["seed=99"])  # something else has been composed from the same files before
    assert composer.compose(["run.name=r"], cell) == compose(["run.name=r", *cell])


def test_cells_do_not_share_what_can_change() -> None:
    composer = Composer()
    first, second = (composer.compose(["run.name=r"], [f"seed={seed}"]) for seed in (1, 2))
    first.trainer["max_steps"] = 1
    first.checkpoint.allow.append("seed")
    assert second == compose(["run.name=r", "seed=2"])


def test_values_that_are_equal_in_python_are_still_different() -> None:
    composer = Composer()
    found = [composer.compose([], [f"trainer.x={value}"]).trainer["x"] for value in ("1", "true", "1.0")]
    assert [repr(value) for value in found] == ["1", "True", "1.0"]


def test_every_bad_cell_is_named_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    overrides = ["job=smoke", f"run.root={tmp_path}/runs", "run.name=s", "seed=1,-1", "trainer.max_steps=5,x,y"]
    with pytest.raises(CellsRefusedError) as refused:
        plan_sweep(overrides)
    lines = str(refused.value).splitlines()
    assert lines[0] == "5 of 6 cells are refused, so nothing was started:"
    assert sum(line.count("seed=") for line in lines[1:]) == 5
    assert "trainer.max_steps: 'x' is refused" in str(refused.value)
    assert "seed: -1 is refused" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_message_about_very_many_cells_stays_short(tmp_path: Path) -> None:
    with pytest.raises(CellsRefusedError) as refused:
        plan_sweep(["job=smoke", f"run.root={tmp_path}", "trainer.max_steps=x", "seed=range(0,50)"])
    assert str(refused.value).splitlines()[1].startswith("  seed=0 · seed=1 · ")
    assert " · and 40 more: trainer.max_steps: 'x'" in str(refused.value)


def test_a_sweep_without_a_name_gets_the_same_one_again(tmp_path: Path) -> None:
    overrides = ["job=smoke", f"run.root={tmp_path}", "seed=1,2"]
    name = plan_sweep(overrides).name
    assert name.startswith("smoke-tiny-python_docs-sweep-")
    assert plan_sweep([*overrides, "preemption.lead_s=50"]).name == name
    assert plan_sweep([*overrides, "trainer.max_steps=5"]).name != name


def test_cells_are_run_directories_under_the_sweep(tmp_path: Path) -> None:
    sweep = plan_sweep(["job=smoke", f"run.root={tmp_path}", "run.name=s", "seed=1,2"])
    assert [cell.plan.directory.path for cell in sweep.cells] == [tmp_path / "s" / "seed=1", tmp_path / "s" / "seed=2"]


def test_a_directory_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="exists and is no sweep"):
        plan_sweep(["job=smoke", f"run.root={tmp_path}", "run.name=s", "seed=1,2"])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is none"):
        plan_sweep(["job=smoke", f"run.root={tmp_path}/file", "run.name=s", "seed=1,2"])


def manifest(tmp_path: Path, *overrides: str) -> SweepManifest:
    sweep = plan_sweep(["job=smoke", f"run.root={tmp_path}", "run.name=s", *overrides])
    make_sweep_directory(sweep)
    found = merged(sweep)
    found.write(sweep.directory)
    return read_sweep_manifest(sweep.directory)


def test_a_sweep_that_grows_keeps_the_indices_of_its_cells(tmp_path: Path) -> None:
    manifest(tmp_path, "seed=5,3")
    grown = manifest(tmp_path, "seed=1,3,7")
    assert {cell.name: cell.index for cell in grown.cells} == {"seed=5": 0, "seed=3": 1, "seed=1": 2, "seed=7": 3}


def test_a_sweep_that_grows_past_its_budget_is_refused(tmp_path: Path) -> None:
    """The cells of earlier commands count, though this one does not name them."""
    manifest(tmp_path, "seed=1,2,3")
    overrides = ["job=smoke", f"run.root={tmp_path}", "run.name=s", "storage.sweep_budget_gb=0.008"]
    with pytest.raises(ConfigError, match=r"storage\.sweep_budget_gb: 0\.008 is refused; .* for 5 cells"):
        plan_sweep([*overrides, "seed=4,5"])
    assert len(plan_sweep([*overrides, "seed=4"]).cells) == 1


def test_a_cell_that_is_another_run_by_now_is_refused(tmp_path: Path) -> None:
    overrides = ["job=smoke", f"run.root={tmp_path}", "run.name=s", "seed=1,2"]
    sweep = plan_sweep(overrides)
    manifest(tmp_path, "seed=1,2")
    prepare_cell(sweep, 0)
    with pytest.raises(
        CellsRefusedError, match=r"1 of 2 cells are refused.*\n  seed=1: run.name: .* another one: trainer.max_steps"
    ):
        check_cells(plan_sweep([*overrides, "trainer.max_steps=5"]))


def test_a_task_of_an_array_finds_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(tmp_path, "seed=5,3")
    with pytest.raises(OutlastError, match="this is no task of one"):
        cell_directory(tmp_path / "s")
    for name, value in {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cell_directory(tmp_path / "s") == tmp_path / "s" / "seed=3"
    assert cell_directory(tmp_path / "s", offset=-1) == tmp_path / "s" / "seed=5"
    with pytest.raises(OutlastError, match="has no cell 1002"):
        cell_directory(tmp_path / "s", offset=1001)


def test_ranges() -> None:
    assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0-3,7,9-10"
    assert ranges([4]) == "4"


def test_what_goes_wrong_in_the_launcher_of_a_cell_is_raised(tmp_path: Path) -> None:
    sweep = plan_sweep(["job=smoke", f"run.root={tmp_path}", "run.name=s", "seed=1,2", "trainer.max_steps=1"])
    for cell in sweep.cells:
        cell.plan.directory.log(1, 0).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        local_sweep.run(sweep, Console(file=StringIO()))

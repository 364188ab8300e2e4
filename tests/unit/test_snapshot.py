"""The code that is frozen at submission: what is copied, what is not, and that it is what gets imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import outlast
from outlast.errors import ConfigError
from outlast.launcher.execution import snapshot
from outlast.launcher.planning.batch_script import pythonpath


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, "-C", directory, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's repository, one file in it committed."""
    path = tmp_path / "my project"
    path.mkdir()
    git(path, "init")
    (path / "mine.py").write_text("VALUE = 1\n")
    (path / ".gitignore").write_text("data/\n")
    git(path, "add", ".")
    git(path, "commit", "-m", "first")
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "r" / "code"


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def imported(target: Path, cwd: Path, code: str) -> str:
    """What a rank would import: started with `-P` from the living tree."""
    env = {**os.environ, "PYTHONPATH": pythonpath(target)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_frozen_package_comes_before_the_installed_one(target: Path, project: Path) -> None:
    snapshot.take(target, project)
    code = (
        "import outlast, outlast.launcher.cli, outlast.jobs.smoke, outlast.conf, outlast.shell.devcluster as d;"
        "from importlib.resources import files;"
        "print(outlast.__file__, outlast.launcher.cli.__file__, outlast.jobs.smoke.__file__, d.__file__,"
        " files('outlast.conf') / 'train.yaml', files('outlast.shell') / 'prologue.sh', sep='\\n')"
    )
    for path in imported(target, project, code).splitlines():
        assert Path(path).is_relative_to(target / "outlast")
        assert Path(path).is_file()


def test_all_of_the_package_is_there(target: Path, project: Path) -> None:
    snapshot.take(target, project)
    own = Path(outlast.__path__[0])
    assert {name for name in files(own) if name.endswith(".py")} <= files(target / "outlast")
    assert not [name for name in files(target) if name.endswith(".pyc")]


def test_the_project_as_it_was_then(target: Path, project: Path) -> None:
    (project / "mine.py").write_text("VALUE = 2\n")
    (project / "new.py").write_text("")
    (project / "data").mkdir()
    (project / "data" / "big.bin").write_text("not code")
    taken = snapshot.take(target, project)
    (project / "mine.py").write_text("a syntax error\n")
    assert files(target / "project") == {"mine.py", "new.py", ".gitignore"}
    assert imported(target, project, "import mine; print(mine.VALUE)") == "2"
    assert taken.project is not None
    assert (taken.project["commit"], taken.project["dirty"]) == (git(project, "rev-parse", "HEAD"), True)
    assert "+VALUE = 2" in (target / "project.patch").read_text()
    assert json.loads((target / "code.json").read_text())["versions"]["torch"]


def test_the_directory_of_the_command_is_importable(target: Path, project: Path) -> None:
    (project / "deep" / "src").mkdir(parents=True)
    (project / "deep" / "helper.py").write_text("print('deep')\n")
    snapshot.take(target, project / "deep")
    assert imported(target, project, "import helper, mine") == "deep"


def test_runs_and_environments_and_secrets_are_no_code(target: Path, project: Path) -> None:
    runs = ["runs/a/ledger.jsonl", "runs/a/checkpoints/x", "sweeps/s/sweep.json", "sweeps/s/c/log"]
    for name in [*runs, "env/pyvenv.cfg", "env/lib/x.py", ".env", "conf/wandb.token", "conf/ok.yaml"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("SECRET")
    taken = snapshot.take(target, project)
    assert files(target / "project") == {"mine.py", ".gitignore", "conf/ok.yaml"}
    assert set(taken.left_out) == {".env", "conf/wandb.token"}


def test_nothing_of_the_environment_is_written(target: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value")
    git(project, "remote", "add", "origin", "https://me:s3cret-value@example.org/x.git")
    snapshot.take(target, project)
    assert not [path for path in target.rglob("*") if path.is_file() and b"s3cret-value" in path.read_bytes()]


def test_a_project_that_is_too_large_is_refused_by_name(target: Path, project: Path) -> None:
    (project / "weights.bin").write_bytes(b"0" * 2_000_000)
    with pytest.raises(ConfigError, match=r"code_limit_mb: 1 .* take 2 MB, the largest: weights.bin \(2.0 MB\)"):
        snapshot.take(target, project, limit_mb=1)
    assert not list(target.parent.iterdir())


def test_a_refused_snapshot_leaves_the_one_before(target: Path, project: Path) -> None:
    snapshot.take(target, project)
    (project / "weights.bin").write_bytes(b"0" * 2_000_000)
    with pytest.raises(ConfigError):
        snapshot.take(target, project, limit_mb=1)
    assert imported(target, project, "import mine; print(mine.VALUE)") == "1"


def test_a_new_one_replaces_the_old_one(target: Path, project: Path) -> None:
    (project / "old.py").write_text("")
    snapshot.take(target, project)
    (project / "old.py").unlink()
    snapshot.take(target, project)
    assert "old.py" not in files(target / "project")
    assert [path.name for path in target.parent.iterdir()] == ["code"]


def test_links(target: Path, project: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("outside")
    (project / "inside").symlink_to("mine.py")
    (project / "away").symlink_to("../outside.txt")
    (project / "broken").symlink_to("nowhere")
    snapshot.take(target, project)
    assert (target / "project" / "inside").resolve() == target / "project" / "mine.py"
    assert (target / "project" / "away").read_text() == "outside"
    assert (target / "project" / "broken").is_symlink()


@pytest.mark.parametrize("name", ["it's $(touch x) `y`.py", "über ünï.py", 'a "quoted" one.py', "new\nline.py"])
def test_names_of_any_kind(target: Path, project: Path, name: str) -> None:
    (project / name).write_text("x")
    snapshot.take(target, project)
    assert (target / "project" / name).read_text() == "x"


def test_without_a_repository_there_is_no_project(target: Path, tmp_path: Path) -> None:
    taken = snapshot.take(target, tmp_path)
    assert taken.project is None
    assert pythonpath(target) == str(target)


def test_outlasts_own_checkout_is_no_project(target: Path) -> None:
    assert snapshot.take(target, Path(__file__).parents[2]).project is None


def test_a_repository_without_a_commit(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "fresh"
    path.mkdir()
    git(path, "init")
    (path / "mine.py").write_text("VALUE = 3\n")
    taken = snapshot.take(target, path)
    assert taken.project is not None
    assert (taken.project["commit"], taken.project["files"]) == (None, 1)


def test_submodules_come_along(target: Path, project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init")
    (other / "sub.py").write_text("")
    git(other, "add", ".")
    git(other, "commit", "-m", "first")
    git(project, "-c", "protocol.file.allow=always", "submodule", "add", str(other), "vendored")
    snapshot.take(target, project)
    assert "vendored/sub.py" in files(target / "project")


def test_where_outlast_is_installed_inside_the_project_the_project_still_counts(project: Path, target: Path) -> None:
    installed = project / "env" / "lib"
    snapshot.take(installed, project)  # an installed package, with its rooms inside
    (project / "env" / "pyvenv.cfg").write_text("")
    code = (
        "from pathlib import Path; from outlast.launcher.execution import snapshot;"
        f"taken = snapshot.take(Path({str(target)!r}), Path({str(project)!r}));"
        "print(taken.outlast['path'], taken.outlast.get('commit'), taken.project['files'])"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("lib/outlast")[-1].split() == ["None", "2"]


HEX = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
HUB = "hf_" + "abCDefGHijKLmnOPqrSTuvWXyz12345678"


@pytest.mark.parametrize("staged", [False, True])
def test_what_looks_like_a_secret_is_left_out_by_name(target: Path, project: Path, staged: bool) -> None:
    secrets = {
        ".envrc": f"export WANDB_API_KEY={HEX}01234567\n",
        ".env": "X=1\n",
        "hf_token.txt": f"{HUB}\n",
        "api_key.txt": f"{HEX}\n",
        "kaggle.json": f'{{"username": "me", "key": "{HEX}"}}\n',
        "notes": "-----BEGIN DSA" + " PRIVATE KEY-----\nabc\n",
        ".ssh/config": "Host x\n",
        ".ssh/id_dsa": "x",
        "settings.yaml": "db_password: hunter2hunter2\n",
    }
    harmless = {
        "run.yaml": f'revision: "{HEX}01234567"\neos_token: "<|endoftext|>"\n',
        "tokenizer_test.py": f'password = "test-only"\ndigest = "{HEX}"\n',
        "data.jsonl": f'{{"id": "{HEX}"}}\n',
    }
    for name, text in (secrets | harmless).items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
    if staged:
        git(project, "add", "-A")
    taken = snapshot.take(target, project)
    assert files(target / "project") == {"mine.py", ".gitignore", *harmless}
    assert {line.partition(":")[0] for line in taken.left_out} == secrets.keys()
    everything = b"".join(path.read_bytes() for path in target.rglob("*") if path.is_file())
    assert HUB.encode() not in everything
    assert f"{HEX}01234567\n".encode() not in everything


def test_a_secret_in_code_is_refused_by_file_and_line(target: Path, project: Path) -> None:
    (project / "mine.py").write_text(f"import os\nlogin('{HUB}')\n")
    with pytest.raises(ConfigError, match=r"mine.py, line 2: a token.*pragma: allowlist secret") as raised:
        snapshot.take(target, project)
    assert HUB not in str(raised.value)
    (project / "mine.py").write_text(f"import os\nlogin('{HUB}')  # pragma: allowlist secret\n")
    assert "mine.py" in files((snapshot.take(target, project), target / "project")[1])


def test_a_secret_that_was_taken_out_is_not_in_the_patch(target: Path, project: Path) -> None:
    (project / "mine.py").write_text(f"login('{HUB}')\n")
    git(project, "commit", "-am", "a mistake")
    (project / "mine.py").write_text("login()\n")
    taken = snapshot.take(target, project)
    assert taken.left_out == ["project.patch: it holds what looks like a secret"]
    assert taken.project is not None
    assert taken.project["dirty"]
    assert not (target / "project.patch").exists()

"""Secrets in a configuration, which is written into the run directory: refused by name, the value never shown."""

import stat
from pathlib import Path

import pytest

from outlast.errors import ConfigError
from outlast.files import write_atomically
from outlast.launcher.execution.freeze import freeze
from outlast.launcher.planning.compose import compose
from outlast.launcher.planning.plan import plan_run
from outlast.launcher.planning.secret_scan import in_text

HEX = "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"
HUB = "hf_" + "abCDefGHijKLmnOPqrSTuvWXyz12345678"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (f"export WANDB_API_KEY={HEX}", "WANDB_API_KEY=…"),
        (f'export X="{HUB}"', "hf_abC… (a token)"),
        ("export DB_PASSWORD=hunter2", "DB_PASSWORD=…"),
        ("ALL,MY_TOKEN=abcd1234", "MY_TOKEN=…"),
        (f"export KAGGLE_KEY={HEX}", "KAGGLE_KEY=…"),
        (f"wandb login {HEX}", "login=…"),
        ("hf auth login --token abcd1234", "token=…"),
        ("git clone https://me:s3cret@example.org/x", "… (Basic Auth Credentials)"),
        ("export GH=ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789", "… (GitHub Token)"),
    ],
)
def test_a_secret_in_a_shell_line(line: str, shown: str) -> None:
    assert in_text(line, shell=True) == shown


@pytest.mark.parametrize(
    "line",
    [
        "module load cuda/12.1 gcc/12.3.0",
        "export HF_TOKEN=$MY_TOKEN",
        'export HF_TOKEN="$(cat ~/.token)"',
        ". ~/.tokens",
        "export HF_TOKEN_PATH=~/.cache/huggingface/token",
        "export TOKENIZERS_PARALLELISM=false",
        "export MAX_TOKENS=4096",
        f"git checkout {HEX}",
        "export PATH=/opt/x/bin:$PATH",
        "ALL,HF_TOKEN",
    ],
)
def test_what_is_none(line: str) -> None:
    assert in_text(line, shell=True) is None


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"cluster.setup=['module load cuda','export WANDB_API_KEY={HEX}']", "cluster.setup"),
        ("cluster.sbatch.export='ALL,HF_TOKEN=abcd1234'", "cluster.sbatch"),
        (f"cluster.srun.export='X={HUB}'", "cluster.srun"),
        (f"run.name={HUB}", "run.name"),
        ("trainer.hub_token=abcd", "trainer.hub_token"),
    ],
)
def test_it_is_refused_before_anything_is_written(override: str, key: str, tmp_path: Path) -> None:
    config = compose(["cluster=slurm", f"run.root={tmp_path}", override])
    with pytest.raises(ConfigError, match=rf"{key}.*secrets must not be written .*\. ~/.my_tokens") as raised:
        plan_run(config, with_script=False)
    assert not any(secret in str(raised.value) for secret in (HEX, HUB, "abcd"))
    assert not list(tmp_path.iterdir())


def test_what_holds_shell_lines_is_not_for_everybody(tmp_path: Path) -> None:
    config = compose(["cluster=slurm", "job=smoke", f"run.root={tmp_path}", "run.name=r", "cluster.setup=['. ~/.x']"])
    run = freeze(plan_run(config, with_script=False))
    for path in (run.config, run.plan):
        assert not path.stat().st_mode & stat.S_IRWXO
        assert path.stat().st_mode & (stat.S_IRUSR | stat.S_IWUSR)
    run.config.chmod(0o644)  # as an older version has left it
    write_atomically(run.config, "", private=True)
    assert not run.config.stat().st_mode & stat.S_IRWXO

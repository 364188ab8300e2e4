"""A loop of the user's own, with accelerate and a DataLoader: resumed, it reads the batches that it would have read."""

import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from .. import forked
from ..conftest import RunProbe
from ..forked import Forked

SCRIPT = Path(__file__).with_name("loop_with_options.py")
EXAMPLE = Path(__file__).with_name("user_loop.py")
STRIKE = """            import os
            os.kill(os.getpid(), 10) if step == 14 else None
"""


def train(directory: Path, ranks: int, options: dict[str, Any], *, epochs: int = 3, port: int = 0) -> tuple[int, str]:
    """Run the script once, on each rank; returns the highest exit code and rank 0's output."""
    directory.parent.mkdir(exist_ok=True)
    started = []
    for rank in range(ranks):
        env = {**os.environ, "OPTIONS": json.dumps(options), "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
        log = directory.with_name(f"{directory.name}.rank-{rank}.log")
        with open(log, "ab") as out:
            started.append((Forked([sys.executable, SCRIPT, directory, str(epochs)], stdout=out, env=env), log))
    try:
        code = max(process.wait(90) for process, _ in started)
    finally:
        for process, _ in started:
            process.kill()
    return code, "".join(log.read_text() for _, log in started)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {}),
        (1, {"seedable": True, "workers": 2}),
        (1, {"stream": True}),
        (2, {}),
        (2, {"stream": True}),
        (3, {"seedable": True}),
    ],
    ids=["plain", "seedable, workers", "stream", "two ranks", "two ranks, stream", "three ranks"],
)
def test_interrupted_it_equals_the_loop_left_alone(tmp_path: Path, ranks: int, options: dict[str, Any]) -> None:
    """Struck at an epoch's last step, after which an evaluation follows, and in the middle of the next epoch."""
    stops = {1: [6, 9], 2: [3, 5], 3: [2, 3]}[ranks]
    twin, run = RunProbe(tmp_path / "twin"), RunProbe(tmp_path / "r")
    code, output = train(twin.path, ranks, options, port=free_port())
    assert code == 0, output
    for _ in stops:
        code, output = train(run.path, ranks, options | {"stops": stops}, port=free_port())
        assert code == 75, output
    code, output = train(run.path, ranks, options | {"stops": stops}, port=free_port())
    assert code == 0, output
    assert [event["step"] for event in run.events("resumed")] == stops
    assert run.weights() == twin.weights()


def test_what_cannot_be_found_again_is_refused_by_name(tmp_path: Path) -> None:
    code, output = train(tmp_path / "r", 1, {"workers": 1, "persistent": True})
    assert code == 2
    assert "valid: persistent_workers=False" in output
    assert "Traceback" not in output


def test_what_could_not_be_read_back_is_refused_at_the_first_save(tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = train(run.path, 1, {"clock": True, "stops": [2]})
    assert code == 1, output
    assert re.search(r"custom_checkpoint_0.pkl: 'datetime.datetime' is refused; a resume reads no code", output)
    assert not list((run.path / "checkpoints").glob("checkpoint-*"))


def test_a_loop_that_reads_its_data_by_itself_is_told_so(tmp_path: Path) -> None:
    """And it is saved periodically: without `every`, as with `auto`, whose first save comes after a minute."""
    run = RunProbe(tmp_path / "r")
    code, output = train(run.path, 1, {"plain": True})
    assert code == 0, output
    assert output.count("WARNING: this loop iterates over a DataLoader by itself") == 1
    assert len(run.events("batches_unknown")) == 1


BATCHES_WITHOUT_END = """
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import outlast
run = outlast.start(sys.argv[1])
loader = DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4, num_workers=1)
run.describe(seed=3, micro_batch=4, accumulation=1)
run.resume_point()
run.begin(0)
batches = run.batches(loader)
for step in (1, 2):
    next(batches)
    run.step_end(step, lambda directory: torch.save({}, directory / "state.pt"))
run.finish(2, lambda directory: torch.save({}, directory / "state.pt"))
"""


def test_a_script_ends_though_its_loader_has_workers_left(tmp_path: Path) -> None:
    script, run = tmp_path / "script.py", RunProbe(tmp_path / "r")
    script.write_text(BATCHES_WITHOUT_END)
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = Forked([sys.executable, script, run.path], stdout=out, env=dict(os.environ))
    try:
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
    assert run.events("finished")
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_loop_that_takes_batches_ahead_is_told_so(tmp_path: Path, ahead: bool) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = train(run.path, 1, {"ahead": ahead}, epochs=1)
    assert code == 0, output
    assert output.count("taken 1 ahead of the step that trains on them") == ahead
    assert len(run.events("not_saved")) == ahead


def test_the_last_step_is_saved(tmp_path: Path) -> None:
    run = RunProbe(tmp_path / "r")
    code, output = train(run.path, 1, {}, epochs=1)
    assert code == 0, output
    assert [(event["step"], event["kind"]) for event in run.events("checkpoint")] == [(6, "periodic"), (6, "final")]


def test_the_example(tmp_path: Path) -> None:
    """Struck once in its second epoch; and the README shows its lines."""
    text = EXAMPLE.read_text()
    lines = [line.strip() for line in text.splitlines() if "run." in line]
    struck = tmp_path / "struck.py"
    struck.write_text(text.replace("            step += 1\n", f"            step += 1\n{STRIKE}"))
    twin, run = RunProbe(tmp_path / "twin"), RunProbe(tmp_path / "r")
    codes = [
        forked.run([sys.executable, script, directory, "3"], tmp_path).returncode
        for script, directory in ((EXAMPLE, twin.path), (struck, run.path), (EXAMPLE, run.path))
    ]
    assert codes == [0, 75, 0]
    assert run.weights() == twin.weights()
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(line in readme for line in lines)

"""Opens runs of MLflow in one process. Argument: a directory. Prints, as JSON, what each of the cases has found."""

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
from transformers import TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback

from outlast.huggingface.tracking.mlflow import Mlflow

root = Path(sys.argv[1])


def opened(name: str, **variables: str) -> dict[str, Any]:
    """What a Trainer's callback has open, and where, in an attempt of the run of this name."""
    os.environ.update(variables)
    directory = root / name
    directory.mkdir(exist_ok=True)
    run: Any = SimpleNamespace(
        directory=SimpleNamespace(path=directory, tracking=directory / "tracking"), say=lambda _: None
    )
    callback, found = MLflowCallback(), dict[str, Any]()
    tracker = Mlflow(run, callback)
    arguments, state = TrainingArguments(output_dir=str(directory), use_cpu=True, report_to="none"), TrainerState()

    def start(args: Any) -> None:
        callback.on_train_begin(args, state, None, model=None)

    def work() -> None:
        tracker.begin(start, arguments, state, [])
        active = mlflow.active_run()
        mlflow.flush_async_logging()
        run = mlflow.MlflowClient().get_run(active.info.run_id)
        found.update(id=run.info.run_id, uri=mlflow.get_tracking_uri(), artifacts=run.info.artifact_uri)
        found["experiment"] = run.info.experiment_id
        found["parameters"] = len(run.data.params)
        tracker.end()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for name in variables:
        os.environ.pop(name, None)  # `end_run` takes one out itself
    return found


first, other, again = opened("first"), opened("other"), opened("other")
given = mlflow.MlflowClient().create_run(mlflow.get_experiment_by_name("outlast").experiment_id).info.run_id
cases = {
    "first": first,
    "other": other,
    "again": again,
    "given": (given, opened("other", MLFLOW_RUN_ID=given)),
    "nested": [opened("nested", MLFLOW_NESTED_RUN="1") for _ in range(2)],
}
with mlflow.start_run() as own:
    cases["script's"] = (own.info.run_id, opened("fifth"))
mlflow.set_tracking_uri(f"sqlite:///{root / 'server.db'}")
cases["chosen"] = (mlflow.set_experiment("chosen").experiment_id, opened("sixth"))
print("FOUND", json.dumps(cases))

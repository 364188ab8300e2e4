"""MLflow: one run in a SQLite store of the run directory, or on the server that `MLFLOW_TRACKING_URI` names."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .gate import Logs, Point, Start, once, tracking_directory
from .identity import Identity

if TYPE_CHECKING:
    from transformers.integrations import MLflowCallback

    from outlast.attempt.attempt import RankAttempt

TAG, SWEEP_TAG = "outlast.run", "outlast.sweep"
PARAMETERS = "MLFLOW_MAX_LOG_PARAMS"
"""The environment variable by which the callback is told how many parameters to log."""
OF_CALLBACK = ("MLFLOW_RUN_ID", "MLFLOW_NESTED_RUN")
"""Variables by which the callback would open a run beside the one that is open."""
JITTER = "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"
"""The jitter between requests that fail: it is drawn from Python's `random`, which belongs to training."""


class Mlflow:
    """Keeps one run of MLflow, found by a tag.

    A store takes no point back, so what is there already is not logged again: it is what is made again.
    """

    name = "mlflow"

    def __init__(self, run: "RankAttempt", callback: "MLflowCallback") -> None:
        self._run, self._callback = run, callback
        self._own = False
        self._scripts = _open_run()
        """The run that the script has open, in the thread that this is called in."""
        if self._scripts:
            run.say(
                f"MLflow: the script has opened the run {self._scripts}, and training is logged to that. MLFLOW_RUN_ID "
                "or the script has to open the same one in each attempt"
            )

    def begin(self, start: Start, args: Any, state: Any, history: list[Logs]) -> Callable[[Point], bool]:
        """Open the run, new or not."""
        import mlflow

        os.environ.setdefault(JITTER, "0")
        if mlflow.active_run() is not None:  # of this thread alone
            mlflow.end_run()
        local = self._scripts is None and (not mlflow.is_tracking_uri_set() or mlflow.get_tracking_uri() in _opened)
        if local:
            place = tracking_directory(self._run, self.name)
            mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
            _opened.add(mlflow.get_tracking_uri())
        client = mlflow.MlflowClient()
        found, begun = (self._scripts, True) if self._scripts else self._found(client, local=local)
        there: Counter[Point] = Counter()
        for key in client.get_run(found).data.metrics if begun else ():
            there.update((key, point.step) for point in client.get_metric_history(found, key))
        mlflow.set_experiment(
            experiment_id=client.get_run(found).info.experiment_id
        )  # else a run of another is refused
        mlflow.start_run(run_id=found)
        self._own = self._scripts is None
        # Parameters can't be changed: those of the first attempt stay.
        params, given = client.get_run(found).data.params.keys(), self._scripts or os.environ.get("MLFLOW_RUN_ID")
        logged = bool(params & args.to_dict().keys() if given else params)
        with _environment({PARAMETERS: "0"} if logged else {}, without=OF_CALLBACK):
            start(args)
        return once(there)

    def named(self, key: str) -> str:
        """The name of a metric, as the callback makes it."""
        return re.sub(r"[^0-9A-Za-z_\-\.\ :/]", "_", key)

    def end(self) -> None:
        """Write what is waiting, and mark the run as finished."""
        import mlflow

        if self._own:
            mlflow.flush_async_logging()
            mlflow.end_run()

    def _found(self, client: Any, *, local: bool) -> tuple[str, bool]:
        """The run's id in the store, and whether it was there before."""
        if own := os.environ.get("MLFLOW_RUN_ID"):
            return own, True
        who = Identity.of(self._run)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        number = os.environ.get("MLFLOW_EXPERIMENT_ID")  # `mlflow.set_experiment` sets it too
        if local or name or not number:
            place = tracking_directory(self._run, self.name) / "artifacts"
            more = {"artifact_location": place.as_uri()} if local else {}
            number = _experiment(client, name or who.sweep or "outlast", more)
        found = client.search_runs([number], f"tags.`{TAG}` = '{who.id}'", max_results=1)
        if found:
            return str(found[0].info.run_id), True
        tags = {TAG: who.id} | ({SWEEP_TAG: who.sweep} if who.sweep else {})
        made = client.create_run(number, start_time=int(time.time() * 1000), tags=tags, run_name=who.name)
        return str(made.info.run_id), False


_opened: set[str] = set()
"""The stores that this process has opened for runs."""


def _open_run() -> str | None:
    import mlflow

    run = mlflow.active_run()
    return None if run is None else str(run.info.run_id)


def _experiment(client: Any, name: str, more: dict[str, str]) -> str:
    """Return the id of the experiment of this name, made if need be; cells of a sweep may all want to make it."""
    from mlflow.exceptions import MlflowException

    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, **more))
        except MlflowException:
            if (experiment := client.get_experiment_by_name(name)) is None:
                raise
    return str(experiment.experiment_id)


@contextmanager
def _environment(more: dict[str, str], *, without: tuple[str, ...]) -> Iterator[None]:
    """Set these variables, and have others be unset."""
    before = {name: os.environ.pop(name, None) for name in {*more, *without}}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

"""MLflow: one run in a SQLite store of the run directory, or on the server that `MLFLOW_TRACKING_URI` names."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .gate import Logs, Point, Start, once, tracking_directory
from .identity import Identity

if TYPE_CHECKING:
    from transformers.integrations import MLflowCallback

    from outlast.attempt.attempt import RankAttempt

TAG, SWEEP_TAG = "outlast.run", "outlast.sweep"
PARAMETERS = "MLFLOW_MAX_LOG_PARAMS"
"""The environment variable by which the callback is told how many parameters to log."""


class Mlflow:
    """Keeps one run of MLflow, found by a tag.

    A store takes no point back, so what is there already is not logged again: it is what is made again.
    """

    name = "mlflow"

    def __init__(self, run: "RankAttempt", callback: "MLflowCallback") -> None:
        self._run, self._callback = run, callback
        self._own = False

    def begin(self, start: Start, args: Any, state: Any, history: list[Logs]) -> Callable[[Point], bool]:
        """Open the run, new or not."""
        import mlflow

        if mlflow.active_run() is not None:  # of this thread alone; the script's own is in another
            mlflow.end_run()
        if "MLFLOW_TRACKING_URI" not in os.environ and not _is_set_by_user(mlflow):
            place = tracking_directory(self._run, self.name)
            mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
            _opened.add(mlflow.get_tracking_uri())
        client = mlflow.MlflowClient()
        found, begun = self._found(client)
        mlflow.start_run(run_id=found)
        self._own = True
        before = os.environ.get(PARAMETERS)
        if begun:  # parameters can't be changed: those of the first attempt stay
            os.environ[PARAMETERS] = "0"
        try:
            start(args)
        finally:
            os.environ.pop(PARAMETERS, None)
            if before is not None:
                os.environ[PARAMETERS] = before
        there: Counter[Point] = Counter()
        for key in client.get_run(found).data.metrics if begun else ():
            there.update((key, point.step) for point in client.get_metric_history(found, key))
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

    def _found(self, client: Any) -> tuple[str, bool]:
        """The run's id in the store, and whether it was there before."""
        if own := os.environ.get("MLFLOW_RUN_ID"):
            return own, True
        who = Identity.of(self._run)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or who.sweep or "outlast"
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            place = tracking_directory(self._run, self.name) / "artifacts"
            more = {} if "MLFLOW_TRACKING_URI" in os.environ else {"artifact_location": place.as_uri()}
            number = client.create_experiment(name, **more)
        else:
            number = experiment.experiment_id
        found = client.search_runs([number], f"tags.`{TAG}` = '{who.id}'", max_results=1)
        if found:
            return str(found[0].info.run_id), True
        tags = {TAG: who.id} | ({SWEEP_TAG: who.sweep} if who.sweep else {})
        made = client.create_run(number, start_time=int(time.time() * 1000), tags=tags, run_name=who.name)
        return str(made.info.run_id), False


_opened: set[str] = set()
"""The stores that this process has opened for runs."""


def _is_set_by_user(mlflow: Any) -> bool:
    return bool(mlflow.is_tracking_uri_set()) and mlflow.get_tracking_uri() not in _opened

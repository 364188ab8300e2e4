"""Which trackers see the run."""

from dataclasses import dataclass, fields

from .section import Section


@dataclass(kw_only=True)
class TrackingSection(Section):
    """Trackers that see the run, each an extra of the package; `tracking=[tensorboard,wandb]` picks several."""

    tensorboard: bool = False
    """True: event files in `tracking/tensorboard` of the run directory."""
    wandb: bool = False
    """True: Weights & Biases, online if `WANDB_API_KEY` is set, else in `tracking/wandb` for `wandb sync`."""
    mlflow: bool = False
    """True: MLflow, on the server of `MLFLOW_TRACKING_URI`, else in a SQLite store in `tracking/mlflow`."""
    trackio: bool = False
    """True: Trackio, in a database in `tracking/trackio`."""

    @property
    def chosen(self) -> list[str]:
        """The names of those that are true."""
        return [field.name for field in fields(self) if getattr(self, field.name)]

"""The trackers by the names that `--report_to` takes. A new one is a file beside this one and a line here."""

from __future__ import annotations

from tunesmith.config import TrainConfig
from tunesmith.config.fields import nearest_name
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.base import Tracker, warn_of_failure
from tunesmith.tracking.mlflow import MLflow
from tunesmith.tracking.tensorboard import TensorBoard
from tunesmith.tracking.trackio import Trackio
from tunesmith.tracking.wandb import WeightsAndBiases

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(config: TrainConfig) -> None:
    """Check that every tracker the run asks for can be used; nothing is written.

    Raises:
        ConfigError: there is no tracker of that name, or it lacks its package, its key or its server.
    """
    for name in _chosen(config):
        if name not in TRACKERS:
            near = nearest_name(name, TRACKERS)
            raise ConfigError(
                f"`report_to` names `{name}`; it takes {', '.join(TRACKERS)}, or none",
                f"did you mean `{near}`?" if near else "write --report_to none to log to metrics.jsonl alone",
            )
        TRACKERS[name].check(config)


def open_trackers(run: RunDir, config: TrainConfig, start_step: int) -> dict[str, Tracker]:
    """Return the run's trackers by name, open. Rank 0 only; `start_step` is `Tracker`'s.

    One that can't be opened is left out, with a warning.

    Raises:
        ConfigError: this node lacks a tracker's package.
    """
    trackers: dict[str, Tracker] = {}
    for name in _chosen(config):
        try:
            trackers[name] = TRACKERS[name](run, config, start_step)
        except ConfigError:
            raise
        except Exception as error:  # as in MetricsLog: a tracker never ends the training
            warn_of_failure(name, error)
    return trackers


def _chosen(config: TrainConfig) -> dict[str, None]:
    """Return the names of the run's trackers, each once, in order."""
    return dict.fromkeys([*config.report_to, *(["wandb"] if config.use_wandb else [])])

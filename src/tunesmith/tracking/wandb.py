"""Weights & Biases, set up by its own `WANDB_…` variables and `wandb login`; offline files lie under the run's home."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.base import PROJECT, describe_error, id_of_run, require_package

logger = logging.getLogger(__name__)

_FINISH_TIMEOUT_S = 120
_OFFLINE_MODES = ("offline", "dryrun", "disabled")


class WeightsAndBiases:
    """A repeated step is logged again; the tool shows its last values."""

    def __init__(self, run: RunDir, config: TrainConfig, start_step: int) -> None:
        require_package("wandb")
        import wandb

        settings = wandb.Settings(silent=True, console="off", finish_timeout=_FINISH_TIMEOUT_S)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=id_of_run(run),
            name=run.run_name,
            dir=str(run.home),
            config=config.model_dump(mode="json"),
            resume="allow",
            settings=settings,
        )
        # Its own step counter only rises, and a resumed run repeats steps: ours is the x axis.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        logger.info("Weights & Biases: %s", self._run.dir if self._run.offline else self._run.url)

    @staticmethod
    def check(config: TrainConfig) -> None:
        """Check the package, the variables, and that there is a key unless the mode is offline; nothing is sent."""
        require_package("wandb")
        import wandb

        try:
            mode = wandb.setup().settings.mode
        except ValueError as error:
            raise ConfigError(
                f"Weights & Biases refuses its settings: {describe_error(error)}",
                "correct the `WANDB_…` environment variables",
            ) from None
        if mode in _OFFLINE_MODES:
            return
        if not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "the run is to be logged to wandb, but no Weights & Biases key is configured",
                "run `wandb login` or set `WANDB_API_KEY`; `WANDB_MODE=offline` logs to a local folder alone",
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)

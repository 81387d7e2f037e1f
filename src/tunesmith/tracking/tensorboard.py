"""TensorBoard: event files under the run's home."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.config import TrainConfig
from tunesmith.runs.folder import RunDir


class TensorBoard:
    """What an earlier attempt has shown of steps after `start_step` disappears."""

    def __init__(self, run: RunDir, config: TrainConfig, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(run.tensorboard_path), purge_step=purge_step, flush_secs=10)

    @staticmethod
    def check(config: TrainConfig) -> None:
        """Find nothing amiss: a default run trains on where TensorBoard is missing, with a warning."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()

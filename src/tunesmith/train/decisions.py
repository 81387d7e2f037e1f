"""What the loop decides, as plain functions of values: every rank comes to the same."""

from __future__ import annotations

from typing import Literal, NamedTuple

from tunesmith.config import TrainConfig
from tunesmith.train.checkpoint import Progress

_LISTED = 32


class Ending(NamedTuple):
    """How a training ends, and why."""

    event: Literal["finished", "stopped", "failed"]
    message: str
    setting: str = ""
    """The setting that a finished training ended at."""


def is_due(step: int, interval: int) -> bool:
    """Return whether something that happens every `interval` steps (0: never) happens at `step`."""
    return interval > 0 and step % interval == 0


def is_logged(step: int, first_step: int, num_steps: int, config: TrainConfig) -> bool:
    """Return whether a step has a line of metrics: every `logging_steps`, an attempt's first and the run's last."""
    return is_due(step, config.logging_steps) or step in (first_step, num_steps)


def is_evaluated(step: int, num_steps: int, config: TrainConfig) -> bool:
    """Return whether the validation set is run after a step: every `eval_steps`, and after the run's last."""
    return is_due(step, config.eval_steps) or step == num_steps


def is_saved(progress: Progress, before: Progress, ending: Ending | None, config: TrainConfig) -> bool:
    """Return whether a checkpoint is due: every `save_steps`, at the end, and where the validation loss is the best."""
    is_best = progress.stopping.best_loss != before.stopping.best_loss
    return ending is not None or is_best or is_due(progress.step, config.save_steps)


def find_ending(
    progress: Progress, num_steps: int, config: TrainConfig, stop_requested: bool = False
) -> Ending | None:
    """Return how the training ends at this point, or None if it goes on."""
    patience = config.early_stopping_patience
    if progress.step >= num_steps:
        setting = "max_steps" if num_steps == config.max_steps else "num_train_epochs"
        return Ending("finished", f"step {progress.step} of {num_steps}", setting)
    if progress.stopping.is_over(patience):
        message = f"early, at step {progress.step}: no improvement in {patience} evaluations"
        return Ending("finished", message, "early_stopping_patience")
    if stop_requested:
        return Ending("stopped", f"on request, at step {progress.step} of {num_steps}")
    return None


def explain_divergence(step: int, loss: float, grad_norm: float, rows: list[int]) -> Ending:
    """Return the failure of a step whose loss or gradient isn't finite, which was trained on these rows (from 0)."""
    listed = ", ".join(str(row + 1) for row in rows[:_LISTED]) + (", …" if len(rows) > _LISTED else "")
    return Ending(
        "failed",
        f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}; the weights are those of "
        f"step {step - 1}. Its examples are lines {listed} of training.jsonl",
    )


def describe_ending(ending: Ending, epoch: float, config: TrainConfig) -> dict[str, float | str]:
    """Return what a later attempt must know of a finished one to tell whether there is more to do."""
    if ending.event != "finished":
        return {}
    return {
        "setting": ending.setting,
        "epoch": epoch,
        "max_steps": config.max_steps,
        "early_stopping_patience": config.early_stopping_patience,
    }

"""What the program says when it stops: one clear error, and a remedy."""

from __future__ import annotations

MISSING_PACKAGE_HINT = (
    "install it where the model runs; for the workers of a cluster it belongs in the image or in Ray's runtime "
    "environment (the chart's `ray.runtime_env_yaml`): a pre_script installs on the head alone"
)


class TunesmithError(Exception):
    """An error that a person is meant to read: `message` says what is wrong, `hint` the remedy.

    `exit_code` is the process's: 2 for bad input, 1 for a failure at work.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[type[TunesmithError], tuple[str, str | None]]:
        # Ray sends errors between processes; the default would pickle only the message.
        return type(self), (self.message, self.hint)


class ConfigError(TunesmithError, ValueError):
    """A setting is unknown, malformed, out of range or at odds with another one."""

    exit_code = 2


class DataError(TunesmithError, ValueError):
    """The data set is absent, malformed, or holds nothing to train on."""

    exit_code = 2


class ModelError(TunesmithError, ValueError):
    """The model or its tokenizer is absent or can't be trained as asked."""

    exit_code = 2


class ResourceError(TunesmithError, ValueError):
    """The run asks for more than the machine or the cluster has."""

    exit_code = 2


class RunError(TunesmithError, RuntimeError):
    """The run folder can't be used: held by another driver, finished, or of another run."""

    exit_code = 2


class LockError(TunesmithError, RuntimeError):
    """A disk has no locks, by which processes keep out of one another's way."""

    exit_code = 2


class CheckpointError(TunesmithError, RuntimeError):
    """A checkpoint can't be written or read."""


class TrainingError(TunesmithError, RuntimeError):
    """Training can't go on: a loss that isn't finite, or workers that keep failing."""


class EvaluationError(TunesmithError, RuntimeError):
    """An evaluation can't go on: the replicas that generate keep failing."""


class ExportError(TunesmithError, RuntimeError):
    """An export can't be written, or isn't equal to what it was made from; nothing was put in place."""


class SubmitError(TunesmithError, RuntimeError):
    """A job can't be handed to a cluster, or is lost there."""

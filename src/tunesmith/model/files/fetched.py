"""A model at an address, as a folder on this machine."""

from __future__ import annotations

from tunesmith.config import TrainConfig
from tunesmith.remote.copies import fetch


def with_model_here(config: TrainConfig, weights: bool = True) -> TrainConfig:
    """Return the settings with the copy's folder where `model_path` is an address; without `weights`, with the rest.

    Raises:
        ModelError: there is nothing, or it can't be read or written.
    """
    if not isinstance(config.model_path, str):
        return config
    return config.model_copy(update={"model_path": fetch(config.model_path, "models", weights)})

"""Fine-tune any Hugging Face causal language model on Ray, from a laptop's CPU to a GPU fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.cluster.ray_train import fine_tune
    from tunesmith.config import TrainConfig

__all__ = ["TrainConfig", "__version__", "fine_tune"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy: the command line must answer before torch and Ray are imported.
    if name == "TrainConfig":
        from tunesmith.config import TrainConfig

        return TrainConfig
    if name == "fine_tune":
        from tunesmith.cluster.ray_train import fine_tune

        return fine_tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

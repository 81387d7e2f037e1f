"""Fine-tune any Hugging Face causal language model on Ray, from a laptop's CPU to a GPU fleet."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.cluster.ray_convert import convert
    from tunesmith.cluster.ray_eval import evaluate
    from tunesmith.cluster.ray_train import fine_tune
    from tunesmith.config import ConvertConfig, EvaluateConfig, TrainConfig

__all__ = [
    "ConvertConfig",
    "EvaluateConfig",
    "TrainConfig",
    "__version__",
    "convert",
    "evaluate",
    "fine_tune",
]

__version__ = "0.1.0"

_HOMES = {
    "ConvertConfig": "tunesmith.config",
    "EvaluateConfig": "tunesmith.config",
    "TrainConfig": "tunesmith.config",
    "convert": "tunesmith.cluster.ray_convert",
    "evaluate": "tunesmith.cluster.ray_eval",
    "fine_tune": "tunesmith.cluster.ray_train",
}


def __getattr__(name: str) -> Any:
    # Lazy: the command line must answer before torch and Ray are imported.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

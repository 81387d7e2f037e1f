"""What has to be generated, and by which engine serving what."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from tunesmith.config import ConvertConfig, EvaluateConfig, ModelRef
from tunesmith.evaluate.engines.base import EngineSpec, Request, Variant
from tunesmith.evaluate.test_set import TestSet
from tunesmith.export.convert import export
from tunesmith.export.whole import find_whole
from tunesmith.model.adapters.vllm import vllm_refuses
from tunesmith.model.load import load_model_config
from tunesmith.runs.tuned import TunedModel

logger = logging.getLogger(__name__)

_EXPORT_PREFIX = ".export_"


@dataclass(frozen=True)
class Served:
    """What an engine loads: a model, and the adapter on it, if any."""

    model: ModelRef
    adapter: Path | None = None


def plan_requests(
    test_set: TestSet,
    variants: list[Variant],
    base_prompts: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
) -> list[Request]:
    """Return a request for each sample and variant; the base model reads its own `base_prompts`, where it has some."""
    others: dict[Variant, Mapping[int, tuple[int, ...]]] = {"tuned": {}, "base": base_prompts}
    return [
        Request(n, variant, others[variant].get(n, p.input_ids))
        for variant in variants
        for n, p in test_set.samples.items()
    ]


def served_as_adapter(tuned: TunedModel, engine: str, use_gpu: bool) -> tuple[Served | None, str | None]:
    """Return the base model with the adapter on it, or None and why the engine can't serve that."""
    if tuned.kind != "adapter":
        return None, "its weights are sharded"
    assert tuned.base is not None, "an adapter has a base"
    if engine == "vllm":
        reason = vllm_refuses(tuned.folder, load_model_config(tuned.base), use_gpu)
        if reason is not None:
            return None, f"vLLM can't serve it as an adapter: {reason}"
    return Served(tuned.base, tuned.folder), None


@contextmanager
def served_whole(
    tuned: TunedModel, reason: str | None, folder: Path, trust_remote_code: bool
) -> Iterator[Served]:
    """Give the tuned model as a folder of whole weights: its own, `final/`, or an export into `folder` for now.

    `reason` says why an export is needed.
    """
    found = find_whole(tuned)
    if found is not None:
        yield Served(ModelRef(found, None, trust_remote_code))
        return
    for left in folder.glob(f"{_EXPORT_PREFIX}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=_EXPORT_PREFIX, dir=folder) as temporary:
        logger.info("exporting %s to a temporary folder, because %s", tuned.label, reason)
        exported = Path(temporary) / tuned.folder.name
        export(tuned, ConvertConfig(verify=False), exported)
        yield Served(ModelRef(exported, None, trust_remote_code))


def make_spec(
    config: EvaluateConfig, served: Served, dtype: str, max_model_len: int, **more: Any
) -> EngineSpec:
    """Return what the engine is made from; `more` are the fields that follow from the machine and the test set."""
    return EngineSpec(
        model=served.model,
        adapter=served.adapter,
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=max_model_len,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        **more,
    )

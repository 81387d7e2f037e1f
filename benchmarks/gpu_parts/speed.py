"""Speed and memory: of LoRA, compiled or not and without each lever; of full fine-tuning; by the length of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from in_process import make_job, swap_tokens

from gpu_parts.bench import Bench, Figures, Work
from gpu_parts.environment import flash_implementations
from gpu_parts.profile import profile_step
from gpu_parts.shapes import SHAPES, mixed_lengths, write_rows
from tunesmith.config import TrainConfig
from tunesmith.data.batches import BatchPlan
from tunesmith.model.kernels import install
from tunesmith.model.kernels.install import Kernels, kernels_for
from tunesmith.train.state import Training

# Of the default, measured first and last: how far two measurements of the same are apart.
_AGAIN = "default, once more"


def train_lora(bench: Bench) -> Iterator[Work]:
    """Measure the shape with rows of one example, with rows of several, and where the time of a step goes."""
    shape = bench.scale.shape
    config = _lora(bench, "lora", shape)
    planned = bench.plan(config)
    with bench.training(config) as training:
        yield "rows of one example", lambda: {**bench.measure_steps(training), **planned}
        yield "profile", lambda: profile_step(bench, training)
        mixed = _take_mixed_rows(bench, training)
        yield "rows of several examples", lambda: {**bench.measure_steps(mixed), **planned}


def train_compiled(bench: Bench) -> Iterator[Work]:
    config = _lora(bench, "compiled", bench.scale.shape, torch_compile=True)
    yield "rows of one example", partial(bench.measure, config)


def leave_levers_out(bench: Bench) -> Iterator[Work]:
    """Measure a shallower model as it is, compiled, without each lever, and with other FlashAttentions."""
    default = kernels_for(bench.device.type)
    ways: dict[str, tuple[Kernels, dict[str, Any]]] = {
        "default": (default, {}),
        **{name: (kernels, {}) for name, kernels in flip_each(default).items()},
        "compiled": (default, {"torch_compile": True}),
    }
    for name, (kernels, settings) in ways.items():
        yield name, partial(_measure_lever, bench, name, kernels, settings)
    if bench.device.type == "cuda":
        for name in flash_implementations():
            yield name, partial(_measure_flash, bench, name, default)
    yield _AGAIN, partial(_measure_lever, bench, _AGAIN, default, {})


def flip_each(kernels: Kernels) -> dict[str, Kernels]:
    """Return the kernels with each of their switches turned, by what it is set to."""
    switches = [field.name for field in fields(kernels) if isinstance(getattr(kernels, field.name), bool)]
    turned = {name: not getattr(kernels, name) for name in switches}
    return {f"{name}={value}": replace(kernels, **{name: value}) for name, value in turned.items()}


def train_in_full(bench: Bench) -> Iterator[Work]:
    for shape in bench.scale.full:
        config = _lora(bench, f"full {shape}", shape, full_ft=True)
        yield shape, partial(bench.measure, config)


def lengthen_rows(bench: Bench) -> Iterator[Work]:
    """Measure what rows of growing length hold, one row a microbatch, until the plan says that they don't fit."""
    shape = bench.scale.shape
    for length in bench.scale.lengths:
        rows = bench.full_rows(shape, length, bench.num_steps + 1)
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        model = bench.model(shape)
        config = bench.lora(f"length {length}", model, rows, max_seq_length=length, **settings)
        yield f"{length}", partial(bench.measure, config)


def _lora(bench: Bench, name: str, shape: str, num_blocks: int | None = None, **settings: Any) -> TrainConfig:
    num_rows = bench.rows * bench.accumulation * (bench.num_steps + 1)
    rows = bench.full_rows(shape, bench.max_length, num_rows)
    return bench.lora(name, bench.model(shape, num_blocks), rows, **settings)


def _take_mixed_rows(bench: Bench, training: Training) -> Training:
    """Return the training over rows that hold several examples each."""
    num_tokens = bench.max_length * bench.rows * bench.accumulation * (bench.num_steps + 1)
    num_words = SHAPES[bench.scale.shape]["vocab_size"] - 1
    lengths = mixed_lengths(num_tokens, bench.max_length)
    rows = write_rows(bench.folder / "mixed.jsonl", lengths, num_words)
    model = training.config.model_path
    assert model is not None
    job = make_job(bench.lora("mixed", model, rows))
    sequences = swap_tokens(training.sequences, job.prepared_path)
    batches = BatchPlan(len(sequences), training.plan.global_batch, training.config.seed)
    return replace(training, sequences=sequences, plan=batches)


def _measure_lever(bench: Bench, name: str, kernels: Kernels, settings: dict[str, Any]) -> Figures:
    config = _lora(bench, f"lever {name}", bench.scale.shape, bench.scale.lever_blocks, **settings)
    with computing_as(kernels, bench.device), bench.training(config) as training:
        return bench.measure_steps(training)


def _measure_flash(bench: Bench, name: str, kernels: Kernels) -> Figures:
    try:
        torch.nn.attention.activate_flash_attention_impl(name)
    except Exception as error:  # whatever a missing package raises
        return {"absent": f"{type(error).__name__}: {error}"}
    try:
        return _measure_lever(bench, name, kernels, {})
    finally:
        torch.nn.attention.restore_flash_attention_impl()


@contextmanager
def computing_as(kernels: Kernels, device: torch.device) -> Iterator[None]:
    """Let models that are built meanwhile compute as `kernels` says, on such devices."""
    name = "CPU" if device.type == "cpu" else "GPU"
    before = getattr(install, name)
    setattr(install, name, kernels)
    try:
        yield
    finally:
        setattr(install, name, before)

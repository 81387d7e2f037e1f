"""The work of a step of LoRA training of a real shape on a GPU, counted without one.

A microbatch runs on torch's meta device, forward and backward, in the ways that a GPU's tensors take, and then the
optimizer; each operation is counted as `work.py` says, and compiled blocks as `fusion.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fusion import counting_backend
from gpu_parts.shapes import SHAPES
from torch import Tensor, nn
from work import H100, Rates, WorkCounter, Works, add

from tunesmith.config import TrainConfig
from tunesmith.model.compilation import compile_blocks
from tunesmith.model.kernels import attention
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.dropout import drawing_from
from tunesmith.model.kernels.install import GPU, Kernels, install_kernels
from tunesmith.model.kernels.loss import sum_cross_entropy
from tunesmith.planning.dry_run import attend_with, make_batch
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.shared_inputs import find_shared_inputs
from tunesmith.train.optimizer import build_optimizer
from tunesmith.train.step import clip_gradients


@dataclass(frozen=True)
class Step:
    """A step of one microbatch, of rows that are full and trained to the last token."""

    shape: str = "llama-3.1-8b"
    rows: int = 2
    max_length: int = 4096
    dropout: float = 0.1
    kernels: Kernels = GPU
    rates: Rates = H100
    is_compiled: bool = False
    drops_by_token: bool = True

    @property
    def num_tokens(self) -> int:
        return self.rows * self.max_length


def count_step(step: Step) -> Works:
    """Return the work of the step by operation; blocks but the first cost equally much."""
    num_blocks = SHAPES[step.shape]["num_hidden_layers"]
    counter = WorkCounter(step.rates)
    # Of one counter: what is compiled for one model serves the other.
    backend = counting_backend(counter) if step.is_compiled else None
    one, two = (_count_shallow(step, depth, counter, backend) for depth in (1, 2))
    return add(one, add(two, one, -1), num_blocks - 1)


def _count_shallow(step: Step, num_blocks: int, counter: WorkCounter, backend: Any) -> Works:
    """Return the work of the step with so many blocks, compiled by `backend` if there is one."""
    model: Any = build_model(step, num_blocks)
    install_kernels(model, step.kernels, find_shared_inputs(model))
    attend_with(model, VARLEN)
    batch = make_batch(step.num_tokens, step.max_length, is_flat=True)
    if backend is not None:
        # The first block is compiled as the others are.
        model.enable_input_require_grads()
        compile_blocks(model, backend, dynamic=False)
    keys_BT = batch.input_ids_BT.int() if step.drops_by_token else None  # else masks are drawn and kept
    counter.works = {}
    with as_on_gpus(), drawing_from(keys_BT), counter:
        sum_cross_entropy(model, batch, fused=True, at_a_time=step.kernels.logits).backward()
        _update(model, _settings(step))
    return counter.works


def build_model(step: Step, num_blocks: int | None = None) -> nn.Module:
    """Return the step's model with adapters and without weights, of all its blocks or so many."""
    from transformers import LlamaConfig

    shape = SHAPES[step.shape]
    model_config = LlamaConfig(**{**shape, "num_hidden_layers": num_blocks or shape["num_hidden_layers"]})
    return build_planned_model(_settings(step), model_config, torch.bfloat16).model


def _settings(step: Step) -> TrainConfig:
    return TrainConfig(
        model_path="model",
        dataset_name="rows.jsonl",
        lora_rank=16,
        lora_alpha=32,
        lora_dropout=step.dropout,
        max_seq_length=step.max_length,
        per_device_train_batch_size=step.rows,
    )


def _update(model: nn.Module, config: TrainConfig) -> None:
    """Clip and take a step, on the CPU: the optimizer's fused kernel has no form without data."""
    numbers = [torch.empty(p.shape, dtype=p.dtype) for p in model.parameters() if p.requires_grad]
    trained = nn.ParameterList(map(nn.Parameter, numbers))
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer = build_optimizer(trained.parameters(), config)
    clip_gradients(trained, config.max_grad_norm)
    optimizer.step()


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Let tensors without data take the ways that a GPU's do."""
    before = attention._attend_on_cpu, F.rms_norm
    attention._attend_on_cpu, F.rms_norm = attention._attend_on_gpu, _norm
    try:
        yield
    finally:
        attention._attend_on_cpu, F.rms_norm = before


def _norm(hidden: Tensor, shape: Any, weight_D: Tensor, eps: float) -> Tensor:
    if torch.compiler.is_compiling():  # it has passes of its own for it
        return torch.rms_norm(hidden, shape, weight_D, eps)
    normed: Tensor = _Norm.apply(hidden, weight_D)
    return normed


class _Norm(torch.autograd.Function):
    """torch's `rms_norm`, which GPUs compute in one pass each way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_D: Tensor) -> Tensor:
        ctx.save_for_backward(
            hidden, weight_D, hidden.new_empty((*hidden.shape[:-1], 1), dtype=torch.float32)
        )
        return torch.ops.roofline.rms_norm(hidden, weight_D)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.roofline.rms_norm_backward(gradient, *ctx.saved_tensors), None


@torch.library.custom_op("roofline::rms_norm", mutates_args=())
def _rms_norm(hidden: Tensor, weight_D: Tensor) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("roofline::rms_norm_backward", mutates_args=())
def _rms_norm_backward(gradient: Tensor, hidden: Tensor, weight_D: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(hidden)


_rms_norm.register_fake(_rms_norm._init_fn)
_rms_norm_backward.register_fake(_rms_norm_backward._init_fn)

"""The gradient of one step, by itself: what the parity tests compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.runs import start
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Sequences
from tunesmith.data.prepare import open_prepared
from tunesmith.model.compilation import compile_blocks
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.install import Kernels
from tunesmith.model.load import attention_of
from tunesmith.model.policy import Policy
from tunesmith.objectives.sft import SFT
from tunesmith.train.build import build_model, choose_ways
from tunesmith.train.step import accumulate_gradients
from tunesmith.train.worker import ProcessWorker

CPU = torch.device("cpu")


def open_sequences(config: TrainConfig, packing: bool) -> Sequences:
    """Return the training sequences of `config`, prepared under its home."""
    return Sequences(open_prepared(start(config).prepared_path).train, packing, pad_token_id=0)


def gradient_of_step(
    config: TrainConfig,
    sequences: Sequences,
    microbatches: Sequence[np.ndarray],
    step: int = 1,
    num_sequences: int = 2,
    kernels: Kernels | None = None,
) -> dict[str, Tensor]:
    """Return loss and gradients of one step, so many sequences at a time, from adapters that do something already."""
    job = start(config)
    model = build_model(config, CPU, world_size=1, kernels=kernels)
    policy = Policy(model, choose_ways(config, model, CPU))
    if config.torch_compile:
        compile_blocks(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # A fresh adapter's B is zero, and so would be the gradient of its A.
                slice_of_it = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                slice_of_it.add_(0.1 * torch.randn(slice_of_it.shape, generator=generator))
    flatten = attention_of(model) == VARLEN
    sequences = Sequences(sequences.tokens, sequences.packing, sequences.pad_token_id, flatten)
    worker = ProcessWorker(0, 1, CPU, job.run)
    result = accumulate_gradients(
        policy, SFT(), sequences, microbatches, step, config.seed, worker, num_sequences
    )
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {**result.sums, **gradients}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(some: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Check that all tensors are alike, relative to the largest entry of each, and that none is all zero."""
    assert some.keys() == other.keys()
    for name in some:
        size = float(some[name].abs().max())
        assert size > 0, name
        assert float((some[name] - other[name]).abs().max()) < tolerance * max(size, 1e-2), name

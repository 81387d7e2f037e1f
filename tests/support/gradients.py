"""The gradient of one step, by itself: what the parity tests compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from support.runs import start
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Sequences
from tunesmith.data.prepare import open_prepared
from tunesmith.model.compilation import compile_blocks
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.install import Kernels
from tunesmith.model.load import attention_of
from tunesmith.model.policy import Policy
from tunesmith.objectives.base import LOSS
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.mesh import Mesh, build_mesh
from tunesmith.train.build import build_model, choose_ways
from tunesmith.train.learner import Learner
from tunesmith.train.step import accumulate_gradients

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
    mesh: Mesh | None = None,
) -> dict[str, Tensor]:
    """Return loss and gradients of one step, so many sequences at a time, from adapters that do something already.

    Without a `mesh`, this process is alone. The loss is the sum over all ranks.
    """
    mesh = mesh or build_mesh(0, 1)
    model = build_model(config, CPU, mesh, kernels=kernels)
    policy = Policy(model, fused_loss=choose_ways(config, model, CPU))
    if config.torch_compile:
        compile_blocks(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # A fresh adapter's B is zero, and so would be the gradient of its A.
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                if isinstance(parameter, DTensor):
                    noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
                parameter.add_(noise)
    flatten = attention_of(model) == VARLEN
    sequences = Sequences(sequences.tokens, sequences.packing, sequences.pad_token_id, flatten)
    learner = Learner(policy, SFT(), mesh, CPU)
    result = accumulate_gradients(learner, sequences, microbatches, step, config.seed, num_sequences)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    (loss,) = mesh.sum([result.tally.sums[LOSS].item()])
    return {"loss": torch.tensor(loss), **gradients}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(some: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Check that all tensors are alike, relative to the largest entry of each, and that none is all zero."""
    assert some.keys() == other.keys()
    for name in some:
        size = float(some[name].abs().max())
        assert size > 0, name
        assert float((some[name] - other[name]).abs().max()) < tolerance * max(size, 1e-2), name

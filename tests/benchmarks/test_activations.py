"""What the benchmark for GPUs keeps for its backward pass, counted from the tensors that autograd saves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from support.paths import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))

from counted_step import Step, as_on_gpus, build_model

from tunesmith.compat import storage_key
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.dropout import drawing_from
from tunesmith.model.kernels.install import GPU, install_kernels
from tunesmith.model.kernels.loss import sum_cross_entropy
from tunesmith.planning.dry_run import attend_with, make_batch, measure_microbatch, planned_kernels
from tunesmith.planning.live_bytes import AnswersNo
from tunesmith.planning.shared_inputs import find_shared_inputs

MOST_BYTES = 30e9
STEP = Step("llama-3.1-8b", rows=2, max_length=4096)


@contextmanager
def count_saved(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Yield the bytes of each storage that autograd keeps, by its key, but for the model's own."""
    own = {storage_key(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage_key(storage) not in own:
            saved[storage_key(storage)] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def count_activations(model: Any) -> int:
    install_kernels(model, GPU, find_shared_inputs(model))
    attend_with(model, VARLEN)
    batch = make_batch(STEP.num_tokens, STEP.max_length, is_flat=True)
    before_loss: list[int] = []
    with as_on_gpus(), drawing_from(batch.input_ids_BT.int()), AnswersNo(), count_saved(model) as saved:
        head = model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda *_: before_loss.append(sum(saved.values())))
        loss = sum_cross_entropy(model, batch, fused=True, at_a_time=GPU.logits)
        handle.remove()
    assert loss.requires_grad
    return before_loss[0]


def test_activations_of_the_benchmark_are_as_planned_and_few() -> None:
    model = build_model(STEP)
    found = count_activations(model)
    kernels = planned_kernels("cuda")
    of_plan = measure_microbatch(model, STEP.num_tokens, STEP.max_length, kernels).kept.activations
    assert of_plan == pytest.approx(found, rel=0.01)
    assert found <= MOST_BYTES

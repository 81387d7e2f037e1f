"""A way of one's own to store frozen weights, in one file: it trains, is sharded and is planned.

Shapes: O outputs, D inputs, N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.runs import losses, small_config, start, train_here, train_on_rank
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.errors import ResourceError
from tunesmith.model.frozen_weights import Dense, FrozenLinear, FrozenWeight
from tunesmith.model.load import load_model_config
from tunesmith.parallel.blocks import find_blocks
from tunesmith.parallel.fsdp import check_shardable
from tunesmith.parallel.mesh import build_mesh
from tunesmith.planning.layout import plan_layout
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.throughput import count_flops_per_token
from tunesmith.train.build import build_model

pytestmark = pytest.mark.usefixtures("alone")

CPU = torch.device("cpu")
ModelOf = Callable[[str], Path]


class Int8Rows(NamedTuple):
    """Integers of one byte, and a float32 scale for each row, seen as bytes."""

    codes_OD: Tensor
    scales_O4: Tensor

    @classmethod
    def pack(cls, rows_OD: Tensor) -> Int8Rows:
        scales_O1 = rows_OD.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes_OD = (rows_OD / scales_O1).round().to(torch.int8)
        return cls(codes_OD.view(torch.uint8), scales_O1.view(torch.uint8))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.codes_OD.view(torch.int8) * self.scales_O4.view(torch.float32)).to(dtype)

    def linear(self, inputs_ND: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return F.linear(inputs_ND, self.dequantize(inputs_ND.dtype), bias_O)

    def add_linear(self, total_NO: Tensor, inputs_ND: Tensor) -> None:
        total_NO.addmm_(inputs_ND, self.dequantize(inputs_ND.dtype).T)

    def input_gradient(self, gradient_NO: Tensor) -> Tensor:
        return gradient_NO @ self.dequantize(gradient_NO.dtype)

    def add_input_gradient(self, total_ND: Tensor, gradient_NO: Tensor) -> None:
        total_ND.addmm_(gradient_NO, self.dequantize(gradient_NO.dtype))


@pytest.fixture(scope="module")
def dequantized(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dense model whose weights are those that `Int8Rows` multiplies by."""
    folder = tmp_path_factory.mktemp("dequantized")
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"))
    for block in find_blocks(model):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = Int8Rows.pack(layer.weight.data).dequantize(torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_of("llama")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes", [{}, {"lora_target_modules": ["q_proj"], "gradient_checkpointing": True}])
def test_a_run_trains_on_the_stored_weights(
    changes: dict[str, Any], dequantized: Path, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    dense, stored = (
        small_config(folder, rows, tmp_path / folder.name, max_steps=2, lora_dropout=0.1, **changes)
        for folder in (dequantized, model_of("llama"))
    )
    expected = losses(train_here(start(dense)))
    found = losses(train_here(replace(start(stored), frozen_weight=Int8Rows)))
    assert set(found) == {1, 2}
    assert found == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.slow
def test_two_workers_hold_half_of_the_bytes_each_and_train_as_one(
    dequantized: Path, model_of: ModelOf, rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    dense = small_config(dequantized, rows, tmp_path / "dense", max_steps=2, fsdp="full_shard")
    stored = small_config(model_of("llama"), rows, tmp_path / "stored", max_steps=2, fsdp="full_shard")
    whole = sum(
        parameter.nbytes for parameter in stored_in(build_model(stored, CPU, build_mesh(0, 1), Int8Rows))
    )
    local = two_workers.run(count_local_bytes, stored)
    assert local == [whole // 2] * 2
    job = replace(start(stored, num_workers=2), frozen_weight=Int8Rows)
    run, _ = two_workers.run(train_on_rank, job)
    expected, _ = two_workers.run(train_on_rank, start(dense, num_workers=2))
    for key in ("loss", "eval_loss"):
        assert losses(run, key) == pytest.approx(losses(expected, key), rel=0, abs=1e-5)


def stored_in(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are stored as bytes."""
    return [parameter for parameter in model.parameters() if not parameter.is_floating_point()]


def count_local_bytes(rank: int, world_size: int, config: TrainConfig) -> int:
    stored = stored_in(build_model(config, CPU, build_mesh(rank, world_size), Int8Rows))
    assert {parameter.dtype for parameter in stored} == {torch.uint8}
    return sum(parameter.to_local().nbytes for parameter in stored if isinstance(parameter, DTensor))


@pytest.mark.parametrize("kind", [Dense, Int8Rows])
def test_the_plan_counts_the_bytes_that_are_stored(
    kind: type[FrozenWeight], model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of("llama"), rows, tmp_path, fsdp="no_shard")
    planned = build_planned_model(config, load_model_config(config.model), torch.float32, kind)
    _, memory = plan_layout(planned, config, "cpu", 1, 1 << 40)
    built = build_model(config, CPU, build_mesh(0, 1), kind)
    assert memory.weights == sum(p.nbytes for p in built.parameters() if not p.requires_grad)
    dense = build_planned_model(config, load_model_config(config.model), torch.float32)
    assert count_flops_per_token(planned.model, False) == count_flops_per_token(dense.model, False)
    assert memory.workspace >= plan_layout(dense, config, "cpu", 1, 1 << 40)[1].workspace


def test_a_layer_s_gradient_is_that_of_its_dequantized_weight() -> None:
    layer = nn.Linear(12, 20).requires_grad_(False)
    frozen = FrozenLinear(layer, Int8Rows)
    layer.weight.data = Int8Rows.pack(layer.weight.data).dequantize(torch.float32)
    inputs = torch.randn(2, 3, 12, requires_grad=True)
    torch.testing.assert_close(frozen(inputs), layer(inputs))
    found, expected = (torch.autograd.grad(each(inputs).square().sum(), inputs) for each in (frozen, layer))
    torch.testing.assert_close(found, expected)


def test_a_torch_that_can_t_shard_bytes_is_named() -> None:
    dense, stored = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4).requires_grad_(False)
    check_shardable(dense, "2.11.0")
    with pytest.raises(ResourceError, match=r"2\.11\.0"):
        check_shardable(FrozenLinear(stored, Int8Rows), "2.11.0")
    check_shardable(FrozenLinear(stored, Int8Rows), "2.12.0")

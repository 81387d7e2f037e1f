"""Canaries: the private parts of libraries that `compat` reads are still there, and still say what we take them to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from support.tiny_models import FAMILIES, build_config
from tunesmith import compat


def build(family: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_config(family, 50))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_name_their_blocks_and_take_attention_by_name(family: str) -> None:
    model = build(family)
    names = compat.block_classes(model)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    assert len(blocks) == model.config.num_hidden_layers
    assert not compat.block_classes(torch.nn.Linear(1, 1))
    assert compat.can_set_attention(model)
    assert compat.supports_flash_attention(model)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert compat.attention_name(model) == name


def test_the_softmax_s_gradient_is_autograd_s() -> None:
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    probabilities, gradient = scores.softmax(-1), torch.arange(15.0).view(3, 5)
    (expected,) = torch.autograd.grad(probabilities, scores, gradient)
    torch.testing.assert_close(compat.softmax_gradient(gradient, probabilities.detach()), expected)


def test_a_cpu_tells_what_it_multiplies_in() -> None:
    assert isinstance(compat.has_bfloat16_instructions(), bool)


def test_compiled_functions_may_have_more_variants() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):
        compat.set_most_variants(9)
        assert torch._dynamo.config.recompile_limit == 9


def test_what_torch_cant_compile_is_told_by_one_error() -> None:
    def fail(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise OSError("no compiler")

    with pytest.raises(compat.compilation_error(), match="no compiler"):
        torch.compile(torch.sin, backend=fail)(torch.zeros(1))


def test_storages_without_data_are_told_apart_and_views_share_theirs() -> None:
    first, second = (torch.empty(4, device="meta") for _ in range(2))
    key = compat.storage_key(first.untyped_storage())
    assert key == compat.storage_key(first.view(2, 2).untyped_storage())
    assert key != compat.storage_key(second.untyped_storage())


def test_a_change_in_place_is_counted() -> None:
    tensor = torch.zeros(4)
    before = compat.count_changes(tensor)
    tensor[:2].add_(1)
    assert compat.count_changes(tensor) == before + 1


def test_every_parameter_and_buffer_is_changed_once() -> None:
    layer = torch.nn.BatchNorm1d(2)
    compat.apply_to_tensors(layer, lambda tensor: tensor + 1)
    assert layer.weight.tolist() == [2, 2]
    assert layer.running_mean.tolist() == [1, 1]


def test_ray_trains_without_its_cleaner_of_places() -> None:
    pytest.importorskip("ray")
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    assert issubclass(compat.trainer_without_cleaner(), TorchTrainer)
    assert callable(DataParallelTrainer._create_default_callbacks)


def test_buffers_of_a_model_without_data_are_computed_as_transformers_does(tmp_path: Path) -> None:
    build_model = AutoModelForCausalLM.from_config
    build_model(build_config("gemma", 50)).save_pretrained(tmp_path)
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="meta")
    assert all(buffer.is_meta for buffer in model.buffers())
    compat.compute_buffers(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())


@pytest.mark.usefixtures("alone")
def test_a_rank_knows_its_slice() -> None:
    whole = torch.arange(6.0).view(3, 2)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
    assert compat.locate_slice(sharded) == ((3, 2), (0, 0))


@pytest.mark.usefixtures("alone")
def test_fsdp_tells_which_weights_it_leaves_gathered() -> None:
    mesh = init_device_mesh("cpu", (1,))
    for reshards in (False, True):
        layer = fully_shard(torch.nn.Linear(2, 3), mesh=mesh, reshard_after_forward=reshards)
        assert compat.stays_gathered(layer) != reshards
    assert not compat.stays_gathered(fully_shard(torch.nn.ReLU(), mesh=mesh))


def test_peft_takes_names_for_those_of_experts() -> None:
    assert compat.names_of_experts(build("mixtral")) == {"gate", "w1", "w2", "w3"}
    assert not compat.names_of_experts(build("llama"))


def test_what_is_reshaped_may_be_changed_in_place() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, values: torch.Tensor) -> torch.Tensor:
            return compat.reshape_own(values.flatten() * 2, (2, 3))

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    values = torch.ones(2, 3, requires_grad=True)
    outputs = Doubled.apply(values)
    outputs.add_(values)
    outputs.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.full((2, 3), 3.0))


def test_cuda_s_allocator_can_be_told_to_widen_its_segments() -> None:
    compat.let_segments_grow()
    if hasattr(torch._C, "_accelerator_getAllocatorSettings"):  # not in torch 2.11
        assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:True"
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")

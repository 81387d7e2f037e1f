"""The sized examples: their models fit the nodes that they ask for, and their settings fit the models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from support.example_models import CONFIGS, INSTANCES, MODELS
from support.paths import REPOSITORY
from support.tiny_models import build_config
from support.values import EXAMPLES, read_run
from tunesmith.config import TrainConfig
from tunesmith.data.formats import choose_format
from tunesmith.model.adapters.lora import add_adapters, choose_targets
from tunesmith.model.load import build_meta_model
from tunesmith.parallel.blocks import find_blocks
from tunesmith.planning.host import estimate_host
from tunesmith.planning.layout import SHARE_FOR_WEIGHTS
from tunesmith.planning.memory import Layout, build_planned_model

GB, GIB = 10**9, 2**30
SFT = "qwen3-14b-sft/fine-tune.yaml"


def gib(quantity: str) -> float:
    units = {"Gi": 1.0, "Mi": 1 / 1024}
    return float(quantity[:-2]) * units[quantity[-2:]]


def read_text(name: str) -> str:
    return (REPOSITORY / "examples" / name).read_text()


def sizes_told(name: str) -> tuple[float, float]:
    """Return what the example's first lines say: GB of weights, and of them on each GPU."""
    told = re.search(r"([\d.]+) GB of weights, ([\d.]+) GB on each GPU", read_text(name))
    assert told
    return float(told[1]), float(told[2])


@pytest.mark.parametrize("name", MODELS)
def test_one_worker_trains_on_each_gpu(name: str, tmp_path: Path) -> None:
    resources = MODELS[name]["resources"]
    config = read_run(MODELS[name], tmp_path)
    assert config.num_workers == resources["nnodes"] * resources["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("name", [*MODELS, SFT])
def test_pods_leave_their_nodes_some_room(name: str) -> None:
    values = EXAMPLES[name]
    instance, limits = INSTANCES[values["resources"]["node_type"]], values["resources"]["limits"]
    efa = values.get("efa")
    assert limits["nvidia.com/gpu"] == 8
    assert 0.9 * instance.cpus < limits["cpu"] + 4 <= instance.cpus
    # Virtualisation, the kubelet and the daemon sets of such a node take up to a tenth.
    used = gib(limits["memory"]) + (gib(efa["hugepages"]) if efa else 0)
    assert 0.8 * instance.memory_gib < used < 0.9 * instance.memory_gib
    assert (efa is not None) == (values["resources"]["nnodes"] > 1)
    assert efa is None or efa["interfaces"] == instance.efa_interfaces
    num_gpus = 8 * values["resources"]["nnodes"]
    assert (
        f"{values['resources']['node_type']}, {num_gpus} {instance.gpu} of {instance.gpu_gb} GB"
        in read_text(name)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, SFT])
def test_the_model_fits_the_gpus_and_the_memory_of_its_nodes(name: str, tmp_path: Path) -> None:
    # Of the two for Qwen3-14B, model and batch are the same.
    config = read_run(MODELS["models/qwen3-14b.yaml" if name == SFT else name], tmp_path)
    model = build_meta_model(config.model, CONFIGS[config.hf_model_id])
    resources = EXAMPLES[name]["resources"]
    instance, num_gpus = INSTANCES[resources["node_type"]], 8 * resources["nnodes"]
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    # Whole where they fill at most half of a GPU, else shared by a node's, as the training itself decides.
    num_shares = 1 if weights <= SHARE_FOR_WEIGHTS * instance.gpu_gb * GB else 8
    assert sizes_told(name) == (round(weights / GB, 1), round(weights / num_shares / GB, 1))
    assert needed_on_gpu(model, config, num_gpus) < 0.6 * instance.gpu_gb * GB

    planned = build_planned_model(config, CONFIGS[config.hf_model_id], torch.bfloat16)
    layout = Layout(num_shares == 1, True, 0, model.config.num_hidden_layers, resources["nnodes"])
    needed = estimate_host(planned, CONFIGS[config.hf_model_id], config, layout, num_gpus)
    assert 8 * needed < 0.5 * gib(resources["limits"]["memory"]) * GIB


@pytest.mark.slow
def test_a_large_model_does_not_fit_a_small_ones_node(tmp_path: Path) -> None:
    config = read_run(MODELS["models/llama-3.1-70b.yaml"], tmp_path)
    model = build_meta_model(config.model, CONFIGS[config.hf_model_id])
    assert needed_on_gpu(model, config, num_gpus=8) > 0.6 * INSTANCES["p4d.24xlarge"].gpu_gb * GB


def needed_on_gpu(model: PreTrainedModel, config: TrainConfig, num_gpus: int) -> float:
    """Return an estimate, in bytes: slices, gathered weights, kept activations and those of one block.

    A block's activations are 34 bytes a token and hidden unit (Korthikanti et al. 2022), doubled for gates and
    adapters. Adapters, their gradients and AdamW's moments are float32.
    """
    shape: Any = model.config
    block = find_blocks(model)[0]
    sizes = [sum(p.numel() for p in module.parameters()) for module in (model, block)]
    rest = sizes[0] - shape.num_hidden_layers * sizes[1]
    targets, _ = choose_targets(model, config)
    adapters = sum(
        config.lora_rank * sum(module.weight.shape)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in targets
    )
    units = config.per_device_train_batch_size * config.max_seq_length * shape.hidden_size
    sliced = (2 * sizes[0] + 16 * adapters) / num_gpus
    # The next block is gathered while one computes.
    gathered = 2 * (2 * sizes[1] + rest)
    return sliced + gathered + 2 * units * shape.num_hidden_layers + 2 * 34 * units


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_adapters_fit_the_family(name: str, tmp_path: Path) -> None:
    config = read_run(MODELS[name], tmp_path)
    family = CONFIGS[config.hf_model_id].model_type
    tiny = AutoModelForCausalLM.from_config(build_config(family, 300))
    model = add_adapters(tiny, config).train()
    ids_BT = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {"lora_A" in name or "lora_B" in name for name, _ in trained} == {True}
    assert any(float(p.grad.abs().max()) > 0 for _, p in trained if p.grad is not None)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in trained}
    attention = {"qkv_proj", "o_proj"} if family == "phi3" else {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert attention <= adapted
    assert (adapted == attention) == (family == "mixtral")


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_of_its_data_set_fill_its_templates(name: str, tmp_path: Path) -> None:
    config = read_run(MODELS[name], tmp_path)
    row = {"instruction": "Be brief.", "input": "Why?", "output": "Because."}
    row_format = choose_format(config, row, "rows")
    rendered = row_format.render(row, "row 1")
    assert rendered["input"] == "### Instruction:\nBe brief.\n ### Input:\nWhy?\n"
    assert rendered["output"] == "### Response:\nBecause."

"""Weights that each worker reads by slices are, to the bit, those that transformers loads whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from support.long import long_but
from support.runs import losses, small_config, start, train_here, train_on_rank
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from support.workers import WorkerGroup
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.files.state import read_weights
from tunesmith.model.files.weight_names import NameMap
from tunesmith.model.files.weight_parts import WeightParts
from tunesmith.model.files.weight_source import open_source
from tunesmith.model.unread import UnreadWeights, load_unread
from tunesmith.parallel.fsdp import numel_of_slice
from tunesmith.parallel.mesh import build_mesh
from tunesmith.train import build
from tunesmith.train.build import build_model

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 8, "use_mamba_kernels": False,
    "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0,
}  # fmt: skip
# What of a family's weights is stacked from what its files have one by one.
STACKED = {
    "mixtral": 4,
    "qwen2_moe": 4,
    "qwen3_moe": 4,
    "olmoe": 4,
    "deepseek_v3": 2,
    "jamba": 4,
    "ernie4_5_moe": 2,
}
KEPT = ("mixtral", "qwen2_moe", "deepseek_v3", "llama", "gemma2", "gpt_oss")
OTHERS = ("llama", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_oss", "llama4_text", "mamba")


def save(family: str, folder: Path, **changes: Any) -> Path:
    """Write a tiny model in bfloat16, every weight and buffer of its files random."""
    shape = SHAPE if family in ("llama", "phi3", "gpt2", "mamba") else {**SHAPE, **EXPERTS}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def unread(folder: Path) -> UnreadWeights:
    weights = load_unread(ModelRef(folder), CPU, torch.float32, "auto")
    assert weights is not None
    return weights


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(it, kind)(remove_duplicate=False)) for it in (model, expected))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name].dtype, found[name].device) == (tensor.dtype, tensor.device), name
            pair = [it.full_tensor() if isinstance(it, DTensor) else it for it in (found[name], tensor)]
            assert torch.equal(*pair), name


@pytest.mark.parametrize("family", long_but(KEPT, [*STACKED, *OTHERS]))
def test_a_model_that_is_filled_is_the_one_that_transformers_loads(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = unread(folder)
    assert all(parameter.isnan().all() for parameter in weights.model.parameters())
    weights.release(weights.model)(weights.model, CPU)
    assert_same(weights.model, expected)
    tied = expected.get_input_embeddings().weight is expected.get_output_embeddings().weight
    assert (
        weights.model.get_input_embeddings().weight is weights.model.get_output_embeddings().weight
    ) == tied


@pytest.mark.parametrize("family", long_but(KEPT, [*STACKED, *OTHERS]))
def test_a_slice_is_that_of_the_whole(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    source = open_source(ModelRef(folder))
    names = NameMap(expected, source.tensors)
    assert sum(names.stacked_files(group) is not None for group in names.groups) == STACKED.get(family, 0)
    parts = WeightParts(source, names)
    for name, whole in expected.named_parameters():
        for dim in range(whole.dim()):
            for num_slices in (2, 3):
                begins = [0] * whole.dim()
                for part in whole.chunk(num_slices, dim):
                    found = parts.read(name, whole.dtype, tuple(part.shape), tuple(begins))
                    assert torch.equal(found, part), (name, dim)
                    assert found.is_contiguous()
                    begins[dim] += part.shape[dim]


def test_weights_are_cast_as_transformers_casts_them(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    model.save_pretrained(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"float32"', '"float16"'))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert expected.dtype == torch.float16
    weights = unread(folder)
    weights.release(weights.model)(weights.model, CPU)
    assert_same(weights.model, expected)


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack weights: model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_unread(ModelRef(folder), CPU, torch.float32, "auto")


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"init_lora_weights": "olora"}, {"modules_to_save": ["lm_head"]}],
    ids=lambda changes: next(iter(changes)),
)
def test_adapters_that_are_made_of_the_weights_are_found_out(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    for more, is_untouched in (({}, True), (changes, False)):
        weights = unread(folder)
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
        adapted = get_peft_model(weights.model, lora, autocast_adapter_dtype=False)
        assert weights.is_untouched(adapted) == is_untouched


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"full_ft": True}),
        ("mixtral", {"fsdp": "full_shard", "dtype": "bfloat16"}),
        ("mixtral", {"fsdp": "no_shard"}),
        ("gemma3_text", {"fsdp": "full_shard", "cpu_offload": True}),
    ],
    ids=str,
)
def test_a_model_is_built_alike_whichever_way_its_weights_are_loaded(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(save(family, tmp_path), "rows.jsonl", tmp_path, **changes)
    by_slices = build_model(config, CPU, build_mesh(0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(build, "load_unread", lambda *_: None)
        whole = build_model(config, CPU, build_mesh(0, 1))
    assert_same(by_slices, whole)
    trained = ([p.requires_grad for p in model.parameters()] for model in (by_slices, whole))
    assert next(trained) == next(trained)


def gather(rank: int, world_size: int, folder: Path, home: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Build the model on a rank; return its whole weights, how they are cut, and what of each it has memory for."""
    config = small_config(folder, "rows.jsonl", home, **changes)
    model = build_model(config, CPU, build_mesh(rank, world_size))
    named = [(name.removeprefix("base_model.model."), p) for name, p in model.named_parameters()]
    return {
        name.replace(".base_layer", ""): (
            p.full_tensor().detach(),
            [it.dim for it in p.placements],
            p.to_local().untyped_storage().nbytes() // p.itemsize,
        )
        for name, p in named
    }


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"fsdp": "full_shard"}, {"full_ft": True}], ids=str)
def test_two_workers_hold_the_whole_and_experts_that_cannot_be_shared_out_are_cut_themselves(
    changes: dict[str, Any], two_workers: WorkerGroup, tmp_path: Path
) -> None:
    folder = save("mixtral", tmp_path, num_local_experts=3, num_experts=3)
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    first, second = two_workers.run(gather, folder, tmp_path, changes)
    assert first.keys() >= expected.keys()
    for name, whole in expected.items():
        for found, dims, numel in (first[name], second[name]):
            assert torch.equal(found, whole), name
            assert dims == [1 if whole.dim() == 3 else 0]
            assert numel == numel_of_slice(whole.shape, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_experts_that_are_cut_train_as_whole_ones(
    two_workers: WorkerGroup, rows: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", build_tokenizer("byte_bpe"), "mixtral", num_local_experts=3)
    for full_ft in (False, True):
        changes = {"full_ft": full_ft, "fsdp": "full_shard", "lora_dropout": 0, "eval_steps": 0}
        jobs = [
            start(
                small_config(
                    model,
                    rows,
                    tmp_path / f"{full_ft}{number}",
                    gradient_accumulation_steps=4 // number,
                    **changes,
                ),
                number,
            )
            for number in (1, 2)
        ]
        train_here(jobs[0])
        two_workers.run(train_on_rank, jobs[1])
        one, two = (losses(job.run) for job in jobs)
        assert two == pytest.approx(one, rel=0, abs=1e-5)
        whole, cut = (read_weights(job.run.checkpoint_path(4)) for job in jobs)
        assert all(torch.allclose(whole[name], cut[name], atol=1e-4) for name in whole)


MIB = 1 << 20
LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_local_experts": 8}


def raised_bytes(
    rank: int, world_size: int, small: Path, large: Path, home: Path, changes: dict[str, Any]
) -> tuple[int, int]:
    """Return by how much building the large model raises a rank's peak memory, and the bytes that it then holds."""
    import gc

    def memory(kind: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

    def build(folder: Path) -> torch.nn.Module:
        config = small_config(folder, "rows.jsonl", home, dtype="bfloat16", **changes)
        return build_model(config, CPU, build_mesh(rank, world_size))

    build(small)  # what is imported and allocated once
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model: Any = build(large)
    raised = memory("VmHWM") - before
    held = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return raised, sum(tensor.nbytes for tensor in held)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's clear_refs")
def test_a_worker_holds_no_more_than_its_slices_and_a_layer_while_it_loads_experts(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("byte_bpe")
    small = save_model(tmp_path / "small", tokenizer, "mixtral", torch.bfloat16)
    large = save_model(tmp_path / "large", tokenizer, "mixtral", torch.bfloat16, **LARGE)
    whole = (large / "model.safetensors").stat().st_size
    layer = whole // LARGE["num_hidden_layers"]
    group = WorkerGroup(2)
    try:
        for fsdp, share in (("full_shard", 2), ("no_shard", 1)):
            measured = group.run(raised_bytes, small, large, tmp_path, {"fsdp": fsdp})
            print(fsdp, [f"{raised / MIB:.0f} MiB for {held / MIB:.0f}" for raised, held in measured])
            for raised, held in measured:
                assert whole / share * 0.9 < held < whole / share * 1.1
                assert raised < held + layer
    finally:
        group.close()

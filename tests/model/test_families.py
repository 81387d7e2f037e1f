"""Every family trains, and what a run leaves behind is the trained model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GptOssConfig,
    JambaConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)

from support.plain_loss import mean_loss
from support.runs import losses, small_config, start, train_here
from support.tiny_models import FAMILIES
from support.tokenizers import build_tokenizer
from tunesmith.errors import ConfigError, ModelError
from tunesmith.export.final import write_final
from tunesmith.model.adapters.lora import choose_targets
from tunesmith.model.files.state import read_weights
from tunesmith.model.load import build_meta_model
from tunesmith.model.probe import keeps_examples_apart
from tunesmith.parallel.mesh import build_mesh
from tunesmith.runs.folder import RunDir
from tunesmith.train.build import build_model
from tunesmith.train.start import check_model

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

ModelOf = Callable[[str], Path]

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 0,
}
NAMED = {"phi3": ["qkv_proj", "down_proj"], "mixtral": ["v_proj", "layers.1.self_attn.q_proj"]}
FAR: dict[str, Any] = {
    "max_steps": 8,
    "input_template": "{instruction}\n",
    "eval_steps": 0,
    "gradient_checkpointing": None,  # every family is looked at for what it may recompute
}


def targets_of(family: str) -> list[str]:
    return NAMED.get(family, ["q_proj", "down_proj"])


@pytest.mark.parametrize("way", ["default", "named, rank-stabilized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_and_its_checkpoint_is_the_trained_model(
    family: str, way: str, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    named = {"lora_target_modules": targets_of(family), "use_rslora": True}
    changes = {} if way == "default" else named
    config = small_config(model_of(family), rows, tmp_path, lora_alpha=6, **FAR, **changes)
    run = train_here(start(config))
    assert losses(run, "eval_loss")[8] < losses(run, "eval_loss")[0] - 0.2

    folder = run.checkpoint_path(8)
    adapted = PeftModel.from_pretrained(load(model_of(family)), folder).eval()
    merged = load(model_of(family))
    scale = 6 / 4 if way == "default" else 6 / math.sqrt(4)
    num_merged = merge(merged, read_weights(folder), scale)
    assert num_merged == len(load_file(folder / "adapter_model.safetensors")) / 2 > 0
    ids_BT = torch.randint(250, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = adapted(input_ids=ids_BT).logits, merged(input_ids=ids_BT).logits
        untrained = load(model_of(family))(input_ids=ids_BT).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert float((untrained - expected).abs().max()) > 0.1
    assert validate(adapted, folder, run) == pytest.approx(losses(run, "eval_loss")[8], rel=0, abs=1e-5)


def merge(model: nn.Module, weights: dict[str, torch.Tensor], scale: float) -> int:
    """Add scale · B · A to the weights of `model`; return to how many."""
    parameters, num_merged = dict(model.named_parameters()), 0
    for name, a in weights.items():
        if ".lora_A." in name:
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            parameters[target].data += scale * (b @ a)
            num_merged += 1
    return num_merged


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_trains_every_weight_and_final_holds_them(
    family: str, packing: bool, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of(family), rows, tmp_path, full_ft=True, packing=packing, **FAR)
    run = train_here(start(config))
    assert losses(run, "eval_loss")[8] < losses(run, "eval_loss")[0] - 0.2
    write_final(run, config.model)

    trained, before = load(run.final_path).state_dict(), load(model_of(family)).state_dict()
    weights = read_weights(run.checkpoint_path(8))
    assert set(before) - set(weights) <= {"lm_head.weight"}  # tied to the embeddings
    assert [name for name in weights if not torch.equal(weights[name], trained[name])] == []
    # Experts that no token was routed to have no gradient.
    assert [name for name in trained if torch.equal(trained[name], before[name])] == []
    final = load(run.final_path)
    assert validate(final, run.final_path, run) == pytest.approx(losses(run, "eval_loss")[8], rel=0, abs=1e-5)


def test_final_holds_the_best_adapter_ready_for_peft(model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    config = small_config(
        model_of("llama"), rows, tmp_path, **{**FAR, "eval_steps": 2, "save_total_limit": 1}
    )
    run = train_here(start(config))
    best = write_final(run, config.model)
    evaluated = losses(run, "eval_loss")
    assert evaluated[best.step] == min(loss for step, loss in evaluated.items() if step > 0)
    adapted = PeftModel.from_pretrained(load(model_of("llama")), run.final_path)
    assert validate(adapted, run.final_path, run) == pytest.approx(best.eval_loss, rel=0, abs=1e-5)


def test_bfloat16_trains_with_float32_adapters_and_master_weights(
    model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    for full_ft in (False, True):
        config = small_config(
            model_of("llama"), rows, tmp_path / str(full_ft), dtype="bfloat16", full_ft=full_ft, **FAR
        )
        run = train_here(start(config))
        assert losses(run, "eval_loss")[8] < losses(run, "eval_loss")[0] - 0.2
        weights = read_weights(run.checkpoint_path(8))
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())
        write_final(run, config.model)
        if full_ft:
            assert {weight.dtype for weight in load(run.final_path, "auto").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_every_linear_layer_but_the_head(
    family: str, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of(family), rows, tmp_path)
    model = load(model_of(family))
    modules, parameters = choose_targets(model, config)
    assert parameters == []
    assert all("." not in name for name in modules)
    chosen = {n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in modules}
    assert chosen == {n for n, module in model.named_modules() if type(module) is nn.Linear} - {"lm_head"}
    adapted = build_model(config, CPU, build_mesh(0, 1))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(chosen)
    assert not any(part in name for name in trained for part in ("lm_head", "experts", ".gate.", "router"))


@pytest.mark.parametrize(
    ("config", "routers"),
    [
        (
            Qwen2MoeConfig(
                **SMALL, num_key_value_heads=2, vocab_size=300, num_experts=4, decoder_sparse_step=1,
                moe_intermediate_size=16, shared_expert_intermediate_size=16, intermediate_size=32,
            ),
            ("shared_expert_gate", "gate"),
        ),
        (
            JambaConfig(
                **SMALL, num_key_value_heads=2, vocab_size=300, num_experts=4, intermediate_size=32,
                expert_layer_period=1, expert_layer_offset=0, attn_layer_period=1, attn_layer_offset=0,
                use_mamba_kernels=False,
            ),
            ("router",),
        ),
    ],
    ids=["qwen2_moe", "jamba"],
)  # fmt: skip
def test_default_targets_leave_routers_and_fused_experts_alone(
    config: PretrainedConfig, routers: tuple[str, ...], model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    settings = small_config(model_of("llama"), rows, tmp_path)
    model = build_meta_model(settings.model, config)
    modules, parameters = choose_targets(model, settings)
    assert modules
    assert parameters == []
    for name, module in model.named_modules():
        is_chosen = any(name == chosen or name.endswith(f".{chosen}") for chosen in modules)
        if name.rsplit(".", 1)[-1] in routers or name == "lm_head" or not isinstance(module, nn.Linear):
            assert not is_chosen, name
        else:
            assert is_chosen, name


def test_experts_train_when_they_are_named(model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    names = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    config = small_config(
        model_of("mixtral"), rows, tmp_path, lora_target_modules=names, lora_dropout=0, **FAR
    )
    check_model(config)
    run = train_here(start(config))
    assert losses(run, "eval_loss")[8] < losses(run, "eval_loss")[0] - 0.2
    folder = run.checkpoint_path(8)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert any(
        "experts" in name and bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name
    )
    adapted = PeftModel.from_pretrained(load(model_of("mixtral")), folder)
    assert validate(adapted, folder, run) == pytest.approx(losses(run, "eval_loss")[8], rel=0, abs=1e-5)


def test_named_experts_are_refused_with_dropout(model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    names = ["q_proj", "experts.gate_up_proj"]
    config = small_config(model_of("mixtral"), rows, tmp_path, lora_target_modules=names, lora_dropout=0.1)
    with pytest.raises(ConfigError, match=r"experts\.gate_up_proj.*dropout") as error:
        check_model(config)
    assert error.value.hint == "set --lora_dropout 0"


@pytest.mark.parametrize(
    "names", [["q_prj"], ["q_proj", "qkv_proj"], ["proj"], ["layers.7.self_attn.q_proj"]]
)
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(
    names: list[str], model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of("llama"), rows, tmp_path, lora_target_modules=names)
    with pytest.raises(ConfigError, match=f"`{names[-1]}`, which matches nothing") as error:
        check_model(config)
    assert "`q_proj`" in str(error.value.hint)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_passes_families_that_keep_packed_examples_apart(
    family: str, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        config = small_config(model_of(family), rows, tmp_path, dtype=str(dtype).removeprefix("torch."))
        model = build_model(config, CPU, build_mesh(0, 1))
        assert keeps_examples_apart(model, CPU, dtype)
        assert model.training


LEAKY = {
    "bloom": BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4, eos_token_id=0),
    "falcon": FalconConfig(vocab_size=512, **SMALL),
    "gpt_oss": GptOssConfig(
        vocab_size=512, **SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=32, num_local_experts=4
    ),
}


def test_a_model_that_mixes_packed_examples_is_refused_where_they_were_cut_for_packs(
    rows: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(LEAKY["bloom"]).save_pretrained(tmp_path / "bloom")
    build_tokenizer("byte_bpe").save_pretrained(tmp_path / "bloom")
    config = small_config(tmp_path / "bloom", rows, tmp_path, **FAR, concatenate=True)
    with pytest.raises(ModelError, match="lets packed examples see one another, and concatenate") as caught:
        train_here(start(config))
    assert caught.value.hint


@pytest.mark.parametrize("family", LEAKY)
def test_a_model_that_mixes_packed_examples_is_trained_padded_with_a_warning(
    family: str, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LEAKY[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / family)
    build_tokenizer("byte_bpe").save_pretrained(tmp_path / family)
    config = small_config(tmp_path / family, rows, tmp_path, **FAR)
    assert config.packing
    with caplog.at_level(logging.WARNING, "tunesmith"):
        run = train_here(start(config))
    assert run.read_params()["packing"] is False
    assert "trained padded" in caplog.text
    # 8 of 54 examples a step, one a sequence.
    tokens, trained = losses(run, "tokens"), losses(run, "trained_tokens")
    assert all(tokens[step] > trained[step] for step in tokens)
    assert losses(run, "epoch")[7] == 1.0
    assert losses(run, "eval_loss")[8] < losses(run, "eval_loss")[0] - 0.2
    caplog.clear()
    train_here(start(config.model_copy(update={"max_steps": 9})))
    assert losses(run, "epoch")[9] == pytest.approx(9 / 7)
    assert "trained padded" not in caplog.text


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def validate(model: Any, tokenizer_folder: Path, run: RunDir) -> float:
    """Return the loss over the run's validation set, computed apart from the run."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return mean_loss(model, tokenizer, Path(run.read_params()["data"]["data_dir"]) / "validation.jsonl")


def test_layers_of_another_kind_are_adapted_and_towers_that_text_never_reaches_are_not(
    rows: Path, tmp_path: Path
) -> None:
    from transformers import Gemma3Config, GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    config = small_config(tmp_path, rows, tmp_path)
    assert choose_targets(gpt2, config)[0] == ["c_attn", "c_fc", "c_proj"]

    text = {**SMALL, "vocab_size": 300, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**SMALL, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
    gemma3 = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    names = [name for name, _ in gemma3.named_modules()]
    assert any("vision" in name for name in names), "the model at hand has a tower"
    targets, _ = choose_targets(gemma3, config)
    adapted = [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]
    assert adapted
    assert not any("vision" in name for name in adapted)


def test_gpt2_trains_and_resumes(rows: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_tokenizer("byte_bpe")
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=0, **shape)).save_pretrained(
        tmp_path / "gpt2"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = small_config(tmp_path / "gpt2", rows, tmp_path, max_steps=8)
    run = train_here(start(config.model_copy(update={"max_steps": 4})))
    train_here(start(config))
    measured = losses(run)
    assert sorted(measured) == list(range(1, 9))
    assert measured[8] < measured[1]

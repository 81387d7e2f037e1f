"""Adapters as PEFT writes them, of every kind we merge: the merge is PEFT's own; others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from support.exports import (
    assert_same_weights,
    convert,
    load,
    load_adapted,
    load_weights,
    logits_of,
    merge_by_peft,
    write_adapter,
)
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ConvertConfig, ModelRef
from tunesmith.errors import ExportError, ModelError
from tunesmith.export.adapter import open_adapter, prove_copy, write_adapter_folder
from tunesmith.export.convert import export
from tunesmith.runs.tuned import TunedModel

pytestmark = pytest.mark.slow

ModelOf = Callable[[str], Path]

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "eos_token_id": 0,
    "pad_token_id": None,
}
OTHER_FAMILIES = {
    "gpt2": GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0),
    "qwen2": Qwen2Config(**SMALL),
    "gpt_oss": GptOssConfig(**SMALL, head_dim=8, num_local_experts=4),
    "olmoe": OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **SMALL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`other(family)` is the folder of a tiny model of one of the other families."""
    folder = tmp_path_factory.mktemp("others")

    def save(family: str) -> Path:
        if not (folder / family).exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(OTHER_FAMILIES[family])
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1 or name.endswith("bias"):
                        parameter.normal_(std=0.15)
            model.save_pretrained(folder / family)
            build_tokenizer("byte_bpe").save_pretrained(folder / family)
        return folder / family

    return save


def assert_merged(base: Path, tuned: TunedModel, output: Path, **settings: Any) -> None:
    """Check an export against PEFT: its merge's weights, and base and adapter's logits."""
    convert(tuned, output, **settings)
    assert_same_weights(output, merge_by_peft(base, tuned.folder), torch.float32)
    expected = logits_of(load_adapted(base, tuned.folder))
    assert float((expected - logits_of(load(base))).abs().max()) > 0.05
    torch.testing.assert_close(logits_of(load(output)), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True, "bias": "lora_only"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}),
        ("qwen2", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
        ("qwen2", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only", "lora_bias": True}),
        ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        ("gpt_oss", {"target_modules": ["o_proj"], "target_parameters": EXPERTS[:1], "use_rslora": True}),
        ("olmoe", {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
        ("olmoe", {"target_modules": ["q_proj"], "modules_to_save": ["mlp.experts", "mlp.gate"]}),
        ("qwen2_moe", {"target_modules": ["k_proj"], "target_parameters": EXPERTS[1:]}),
    ],
)  # fmt: skip
def test_other_families(
    family: str, settings: dict[str, Any], other: Callable[[str], Path], tmp_path: Path
) -> None:
    tuned = write_adapter(other(family), tmp_path / "adapter", **settings)
    assert_merged(other(family), tuned, tmp_path / "out", max_shard_size="50KB")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_an_adapter_of_peft_can_hold(
    family: str, settings: dict[str, Any], model_of: ModelOf, tmp_path: Path
) -> None:
    tuned = write_adapter(model_of(family), tmp_path / "adapter", **settings)
    assert_merged(model_of(family), tuned, tmp_path / "out")


def test_pickled_weights_are_read_too(model_of: ModelOf, tmp_path: Path) -> None:
    base = tmp_path / "base"
    load(model_of("qwen3")).config.save_pretrained(base)
    build_tokenizer("byte_bpe").save_pretrained(base)
    torch.save(load_weights(model_of("qwen3")), base / "pytorch_model.bin")
    tuned = write_adapter(model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj"])
    pickle_adapter(tuned.folder)
    tuned = TunedModel("adapter", tuned.folder, ModelRef(base))
    assert_merged(model_of("qwen3"), tuned, tmp_path / "out")


def test_files_of_a_model_saved_without_its_head_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(OTHER_FAMILIES["gpt2"])
    model.transformer.save_pretrained(tmp_path / "base")
    build_tokenizer("byte_bpe").save_pretrained(tmp_path / "base")
    names = load_weights(tmp_path / "base").keys()
    assert not any(name.startswith("transformer.") for name in names)
    tuned = write_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "lm_head"])
    assert_merged(tmp_path / "base", tuned, tmp_path / "out")
    assert load_weights(tmp_path / "out").keys() - names == {"lm_head.weight"}


def test_what_the_model_does_not_read_is_copied_and_whole_numbers_are_not_cast(
    model_of: ModelOf, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    load(model_of("qwen3")).save_pretrained(base)
    build_tokenizer("byte_bpe").save_pretrained(base)
    extra = {"mtp.weight": torch.ones(3), "model.counter": torch.arange(5)}
    weights = load_weights(base) | extra
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    tuned = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    out = load_weights(convert(tuned, tmp_path / "out", dtype="bfloat16"))
    assert torch.equal(out["model.counter"], extra["model.counter"])
    assert torch.equal(out["mtp.weight"], extra["mtp.weight"].bfloat16())


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"hidden_size": 64}, r"`model\.layers\.0\.self_attn\.q_proj\.weight` is 64×64.*32×32"),
        ("phi3", {}, r"`model\.layers\.0\.self_attn\.q_proj\.weight` is absent"),
        ("llama", {"num_hidden_layers": 1}, r"`model\.layers\.1\.self_attn\.q_proj\.weight` is absent"),
    ],
)
def test_a_wrong_base_model_is_refused_with_what_differs(
    family: str, changes: dict[str, Any], said: str, model_of: ModelOf, tmp_path: Path
) -> None:
    adapter = write_adapter(model_of("llama"), tmp_path / "adapter", target_modules=["q_proj"]).folder
    wrong = save_model(tmp_path / "wrong", build_tokenizer("byte_bpe"), family, **changes)
    with pytest.raises(ModelError, match=said) as error:
        convert(TunedModel("adapter", adapter, ModelRef(wrong)), tmp_path / "out")
    assert "--base_model" in str(error.value.hint)
    assert error.value.exit_code == 2

    with pytest.raises(ModelError, match=said.replace(r"\.weight", "")):
        convert(TunedModel("adapter", adapter, ModelRef(wrong)), tmp_path / "out", no_merge=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_adapter_by_itself_is_the_one_it_was_made_from_byte_for_byte(
    suffix: str, model_of: ModelOf, tmp_path: Path
) -> None:
    tuned = write_adapter(model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    weights = pickle_adapter(tuned.folder) if suffix == ".bin" else tuned.folder / "adapter_model.safetensors"
    exported = export(tuned, ConvertConfig(no_merge=True), tmp_path / "out")
    assert (exported.folder / weights.name).read_bytes() == weights.read_bytes()
    assert exported.describe().endswith("\nthe adapter's weights are the checkpoint's, byte for byte")
    unproven = export(tuned, ConvertConfig(no_merge=True, verify=False), tmp_path / "unproven")
    assert "not compared" in unproven.describe()


def pickle_adapter(folder: Path) -> Path:
    """Turn an adapter's weights into the file that older versions of PEFT wrote."""
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    return weights.with_suffix(".bin")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("no_merge", [True, False])
def test_torn_and_absent_weights_are_refused(
    no_merge: bool, suffix: str, model_of: ModelOf, tmp_path: Path
) -> None:
    tuned = write_adapter(model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj"])
    weights = pickle_adapter(tuned.folder) if suffix == ".bin" else tuned.folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is not a whole"):
        convert(tuned, tmp_path / "out", no_merge=no_merge)
    weights.unlink()
    with pytest.raises(ModelError, match="holds no adapter_model"):
        convert(tuned, tmp_path / "out", no_merge=no_merge)
    assert not (tmp_path / "out").exists()


def test_a_copy_that_differs_in_one_bit_is_caught(model_of: ModelOf, tmp_path: Path) -> None:
    tuned = write_adapter(model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj"])
    assert tuned.base is not None
    adapter = open_adapter(tuned.folder, tuned.base)
    (tmp_path / "out").mkdir()
    write_adapter_folder(adapter, tuned, tmp_path / "out")
    assert prove_copy(adapter, tmp_path / "out").num_weights == sum(
        tensor.numel() for tensor in load_file(adapter.weights).values()
    )
    copy = tmp_path / "out" / adapter.weights.name
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ExportError, match="isn't the adapter"):
        prove_copy(adapter, tmp_path / "out")


def test_a_quantized_base_is_refused(model_of: ModelOf, tmp_path: Path) -> None:
    tuned = write_adapter(model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj"])
    base = tmp_path / "base"
    load(model_of("qwen3")).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantized") as error:
        convert(TunedModel("adapter", tuned.folder, ModelRef(base)), tmp_path / "out")
    assert "--no_merge" in str(error.value.hint)


def test_what_float16_cannot_hold_is_refused(model_of: ModelOf, tmp_path: Path) -> None:
    tuned = write_adapter(
        model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=10**8
    )
    with pytest.raises(ExportError, match="beyond what float16 can hold"):
        convert(tuned, tmp_path / "out", dtype="float16")
    assert list(tmp_path.glob(".out_*")) == []

"""Adapters of every kind that PEFT writes: what PEFT makes of base and adapter, the export is, tied weights or not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from safetensors.torch import save_file
from transformers import AutoTokenizer

from support.exports import convert, load, load_weights, logits_of, write_any_adapter
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.export.merge import open_merge
from tunesmith.export.sample import prove_by_sample
from tunesmith.runs.tuned import TunedModel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ModelOf = Callable[[str], Path]

# Rows of the tiny models' embeddings.
ROWS = 506
TIED, UNTIED = "llama", "qwen3"


def lora(*more_targets: str, **settings: Any) -> LoraConfig:
    targets = ["q_proj", "down_proj", *more_targets]
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **settings})


def tokens(*numbers: int, **others: list[int]) -> dict[str, Any]:
    return {"trainable_token_indices": {"embed_tokens": [*numbers], **others} if others else [*numbers]}


def peft_logits(base: Path, tuned: TunedModel, rows: int) -> torch.Tensor:
    """Return the logits of PEFT's own base and adapter, as they are, for all tokens."""
    return logits_of(PeftModel.from_pretrained(load(base, rows=rows), tuned.folder).eval(), rows)


def assert_exported(
    base: Path,
    tuned: TunedModel,
    output: Path,
    rows: int = ROWS,
    is_tied: bool | None = None,
    **settings: Any,
) -> None:
    """Check an export against PEFT's base and adapter, and that the proofs pass."""
    expected = peft_logits(base, tuned, rows)
    convert(tuned, output, **settings)
    torch.testing.assert_close(logits_of(load(output), rows), expected, rtol=2e-4, atol=2e-4)
    tuned_logits, base_logits = (logits_of(load(folder), ROWS)[..., :ROWS] for folder in (output, base))
    assert float((tuned_logits - base_logits).abs().max()) > 0.05
    assert tuned.base is not None
    assert prove_by_sample(open_merge(tuned, tuned.base, None), output).num_weights > 1000
    config = json.loads((output / "config.json").read_text())
    assert config["vocab_size"] == rows
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in load_weights(output))
    assert is_tied is None or config["tie_word_embeddings"] == is_tied


@pytest.mark.parametrize(
    ("family", "settings", "is_tied"),
    [
        (TIED, lora(use_dora=True, use_rslora=True), True),
        pytest.param(TIED, lora("embed_tokens", use_dora=True), False, marks=pytest.mark.long),
        (UNTIED, lora("embed_tokens", "lm_head", use_dora=True), False),
        (UNTIED, lora(init_lora_weights="pissa"), False),
        pytest.param(TIED, lora(init_lora_weights="olora", use_rslora=True), True, marks=pytest.mark.long),
        (TIED, lora(init_lora_weights="pissa", use_dora=True), True),
        pytest.param(UNTIED, lora(init_lora_weights="mica"), False, marks=pytest.mark.long),
        (TIED, lora(modules_to_save=["embed_tokens"]), False),
        pytest.param(UNTIED, lora(modules_to_save=["embed_tokens"]), False, marks=pytest.mark.long),
        pytest.param(TIED, lora(modules_to_save=["embed_tokens", "lm_head"]), False, marks=pytest.mark.long),
        (TIED, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
        pytest.param(TIED, lora("embed_tokens", ensure_weight_tying=True), True, marks=pytest.mark.long),
        (TIED, lora(modules_to_save=["layers.1.mlp", "norm"], target_modules=["q_proj"]), True),
        (TIED, lora(**tokens(3, 505)), True),
        pytest.param(UNTIED, lora(**tokens(3, 505)), False, marks=pytest.mark.long),
        pytest.param(TIED, lora(**tokens(3, 5, lm_head=[7])), False, marks=pytest.mark.long),
        (TIED, lora(**tokens(3, 5, lm_head=[3, 5])), True),
    ],
)
def test_every_kind_of_lora(
    family: str, settings: LoraConfig, is_tied: bool, model_of: ModelOf, tmp_path: Path
) -> None:
    start = 1.0 if settings.init_lora_weights in ("pissa", "olora") else 0.0
    tuned = write_any_adapter(model_of(family), tmp_path / "adapter", settings, start=start)
    assert_exported(
        model_of(family),
        tuned,
        tmp_path / "out",
        is_tied=is_tied,
        verify=settings.init_lora_weights == "pissa",
    )


def test_single_experts_of_older_versions(model_of: ModelOf, tmp_path: Path) -> None:
    """PEFT named each expert's matrices before transformers stacked them; it still reads such adapters."""
    torch.manual_seed(0)
    modules = {"self_attn.q_proj": (32, 32), "block_sparse_moe.gate": (4, 32)}
    for expert in range(4):
        experts = {"w1": (64, 32), "w3": (64, 32), "w2": (32, 64)}
        modules |= {f"block_sparse_moe.experts.{expert}.{name}": it for name, it in experts.items()}
    tensors = {}
    for path, (out, into) in modules.items():
        name = f"base_model.model.model.layers.1.{path}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, into) * 0.15
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 4) * 0.15
    settings = lora(target_modules=["q_proj", "gate", "w1", "w2", "w3"])
    settings.save_pretrained(tmp_path / "adapter")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    tuned = TunedModel("adapter", tmp_path / "adapter", ModelRef(model_of("mixtral")))
    assert_exported(model_of("mixtral"), tuned, tmp_path / "out", verify=True)
    convert(tuned, tmp_path / "alone", no_merge=True)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """`padded(family)` is the folder of a tiny model with more rows than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("padded")

    def save(family: str) -> Path:
        if not (folder / family).exists():
            save_model(folder / family, build_tokenizer("byte_bpe"), family, vocab_size=512)
        return folder / family

    return save


@pytest.mark.parametrize(
    ("family", "settings", "rows", "is_tied"),
    [
        (TIED, lora(), 514, True),
        (UNTIED, lora(), 506, False),  # cut to the tokenizer's length
        (TIED, lora(modules_to_save=["embed_tokens", "lm_head"]), 514, False),
        (TIED, lora(modules_to_save=["embed_tokens"]), 506, False),
        (TIED, lora("embed_tokens", "lm_head", use_dora=True), 514, False),
        (TIED, lora(**tokens(512, 513, lm_head=[512, 513])), 514, True),
    ],
)
def test_embeddings_that_were_grown_or_cut(
    family: str, settings: LoraConfig, rows: int, is_tied: bool, padded: ModelOf, tmp_path: Path
) -> None:
    tuned = write_any_adapter(padded(family), tmp_path / "adapter", settings, rows=rows)
    assert_exported(padded(family), tuned, tmp_path / "out", rows, is_tied, verify=rows == 506)


@pytest.mark.parametrize(
    ("family", "settings", "rows"),
    [
        (TIED, lora(**tokens(4, 512, 513)), 514),
        (UNTIED, lora(**tokens(4, 512, 513, lm_head=[512, 513])), 514),
        (UNTIED, lora(modules_to_save=["embed_tokens", "lm_head"]), 514),
        (TIED, lora("embed_tokens"), 506),
    ],
)
def test_new_rows_alone_are_enough(
    family: str, settings: LoraConfig, rows: int, padded: ModelOf, tmp_path: Path
) -> None:
    base = padded(family)
    tuned = write_any_adapter(base, tmp_path / "adapter", settings, rows=rows, save_embedding_layers=False)
    assert_exported(base, tuned, tmp_path / "out", rows)


@pytest.mark.parametrize("rows", [506, 514])
def test_the_card_of_an_adapter_by_itself_puts_it_on_its_base(
    rows: int, padded: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = padded(TIED)
    settings = lora(modules_to_save=["embed_tokens", "lm_head"])
    tuned = write_any_adapter(base, tmp_path / "adapter", settings, rows=rows)
    folder = convert(tuned, tmp_path / "alone", no_merge=True)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    torch.testing.assert_close(logits_of(found["model"].eval(), rows), peft_logits(base, tuned, rows))


def test_a_tokenizer_with_tokens_that_the_adapter_holds_no_rows_for_is_told(
    padded: ModelOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = write_any_adapter(padded(TIED), tmp_path / "adapter", lora())
    tokenizer = AutoTokenizer.from_pretrained(padded(TIED))
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{n}|>" for n in range(8)]})
    tokenizer.save_pretrained(tuned.folder)
    with caplog.at_level(logging.WARNING, "tunesmith"):
        convert(tuned, tmp_path / "out", verify=True)
    assert "has 514 tokens and the tuned model rows for 512" in caplog.text


@pytest.mark.parametrize(
    ("family", "settings", "lost"),
    [
        (UNTIED, lora(**tokens(506, 507)), "`lm_head.weight`"),
        (UNTIED, lora(**tokens(507, lm_head=[506, 507])), "`model.embed_tokens.weight`"),
        (TIED, lora("embed_tokens"), "`model.embed_tokens.weight` and `lm_head.weight`"),
        (TIED, lora(modules_to_save=["embed_tokens"]), "`lm_head.weight`"),
    ],
)
@pytest.mark.parametrize("no_merge", [True, False])
def test_new_rows_that_the_adapter_lacks_are_named(
    no_merge: bool, family: str, settings: LoraConfig, lost: str, model_of: ModelOf, tmp_path: Path
) -> None:
    base = model_of(family)
    tuned = write_any_adapter(base, tmp_path / "adapter", settings, rows=508, save_embedding_layers=False)
    with pytest.raises(ModelError, match="grown from 506 to 508 rows") as error:
        convert(tuned, tmp_path / "out", no_merge=no_merge)
    assert error.value.message.endswith(f"lacks the new ones of {lost}")
    assert "save_embedding_layers=True" in str(error.value.hint)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (UNTIED, IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
        (TIED, LoHaConfig(target_modules=["q_proj"], r=4, alpha=6, modules_to_save=["embed_tokens"])),
        (TIED, OFTConfig(target_modules=["q_proj"], oft_block_size=8)),
        (TIED, TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 5])),
        (TIED, lora("lm_head", init_lora_weights="pissa")),
    ],
)
def test_other_methods_are_merged_by_peft(
    family: str, settings: PeftConfig, model_of: ModelOf, tmp_path: Path
) -> None:
    tuned = write_any_adapter(model_of(family), tmp_path / "adapter", settings, start=1.0)
    assert_exported(model_of(family), tuned, tmp_path / "out", verify=isinstance(settings, IA3Config))


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        (
            lora(init_lora_weights="pissa_niter_4"),
            "`init_lora_weights` pissa_niter_4: it takes a random",
            "plain LoRA",
        ),
        (lora(init_lora_weights="lora_ga"), "`init_lora_weights` lora_ga: it took off", "plain LoRA"),
        (lora(lora_bias=True), "a bias for `model.layers.0.mlp.down_proj`", "--engine transformers"),
        (lora(layer_replication=[(0, 2), (1, 2)]), "`model.layers.2", "--engine transformers"),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            "it stands before the prompt",
            "--engine transformers",
        ),
    ],
)
def test_what_cannot_be_merged_is_named_with_a_way_out(
    settings: PeftConfig, said: str, hint: str, model_of: ModelOf, tmp_path: Path
) -> None:
    tuned = write_any_adapter(model_of("llama"), tmp_path / "adapter", settings)
    with pytest.raises(ModelError, match=said) as error:
        convert(tuned, tmp_path / "out")
    assert hint in str(error.value.hint)
    assert not (tmp_path / "out").exists()
    convert(tuned, tmp_path / "alone", no_merge=True)

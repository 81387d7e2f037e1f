"""The base model's answers are the base's and the tuned one's PEFT's, whatever an adapter does to the weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from support.exports import load, write_any_adapter
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import EvaluateConfig, ModelRef
from tunesmith.errors import ModelError
from tunesmith.evaluate.engines.base import EngineSpec, Request
from tunesmith.evaluate.engines.choose import make_engine
from tunesmith.evaluate.engines.pool import LocalPool
from tunesmith.evaluate.evaluation import run_evaluation
from tunesmith.runs.tuned import find_tuned

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ModelOf = Callable[[str], Path]

ROWS = 506
NEW_TOKENS = ["<|turn|>", "<|done|>"]
QUESTIONS = ("1 plus 2?", "What is 7 plus 5 plus 1?", "4?")


def lora(*more_targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", *more_targets], **settings}
    )


def answers(folder: Path) -> dict[tuple[str, int], list[int]]:
    """Return the kept answers as token ids, by variant and sample."""
    lines = (folder / "generations.jsonl").read_text().splitlines()[1:]
    return {(line["variant"], line["sample"]): line["token_ids"] for line in map(json.loads, lines)}


@torch.no_grad()
def greedy(model: Any, prompt: list[int], stops: set[int], limit: int = 8) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def evaluate_here(adapter: Path, where: Path, prompts: list[str], **changes: Any) -> Path:
    rows = [{"input": prompt, "output": "8"} for prompt in prompts]
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvaluateConfig(
        checkpoints_dir=str(adapter),
        home=where,
        test_dataset=str(where / "rows.jsonl"),
        engine="transformers",
        dtype="float32",
        max_tokens=8,
        metrics=["chrf"],
        **changes,
    )
    return run_evaluation(config, find_tuned(config), LocalPool(False, 1)).folder


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose linear layers have biases."""
    folder = tmp_path_factory.mktemp("biased")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=ROWS, hidden_size=32, intermediate_size=64, eos_token_id=0, **shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer("byte_bpe").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", lora(init_lora_weights="pissa")),
        ("qwen3", lora(init_lora_weights="olora")),
        ("llama", lora("embed_tokens", use_dora=True)),
        ("biased", lora(bias="all")),
        ("llama", lora(modules_to_save=["embed_tokens"])),
        ("llama", lora(trainable_token_indices=[*range(40, 90)])),
        # What can't be merged is taken as it is.
        ("llama", lora(lora_bias=True)),
        ("llama", lora(layer_replication=[(0, 2), (1, 2)])),
        ("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    ],
)
def test_base_and_tuned_answer_as_they_do_alone(
    family: str, settings: PeftConfig, model_of: ModelOf, biased: Path, tmp_path: Path
) -> None:
    base = biased if family == "biased" else model_of(family)
    start = 1.0 if getattr(settings, "init_lora_weights", True) in ("pissa", "olora") else 0.0
    tuned = write_any_adapter(base, tmp_path / "adapter", settings, start=start)
    folder = evaluate_here(tuned.folder, tmp_path, [*QUESTIONS])
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {"base": load(base), "tuned": PeftModel.from_pretrained(load(base), tuned.folder).eval()}
    expected = {
        (variant, n): greedy(model, tokenizer(question)["input_ids"], {0})
        for variant, model in models.items()
        for n, question in enumerate(QUESTIONS)
    }
    assert answers(folder) == expected
    assert any(expected["base", n] != expected["tuned", n] for n in range(len(QUESTIONS)))


def test_an_engine_that_is_asked_for_both_at_once_has_a_base_of_its_own(
    model_of: ModelOf, tmp_path: Path
) -> None:
    base = model_of("llama")
    tuned = write_any_adapter(base, tmp_path / "adapter", lora(init_lora_weights="pissa"), start=1.0)
    prompt = build_tokenizer("byte_bpe")(QUESTIONS[0])["input_ids"]
    spec = EngineSpec(ModelRef(base), tuned.folder, "float32", 64, 8, 0.0, 0, 1.0, (0,), 0, 4)
    with closing(make_engine("transformers", spec)) as engine:
        requests = [Request(n, variant, tuple(prompt)) for n, variant in enumerate(("base", "tuned", "base"))]
        found = {it.sample: list(it.token_ids) for together in engine.generate(requests) for it in together}
    assert found[0] == found[2] == greedy(load(base), prompt, {0})
    assert found[1] == greedy(PeftModel.from_pretrained(load(base), tuned.folder).eval(), prompt, {0})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_base_without_the_new_tokens_reads_their_text_and_answers_from_its_own_head(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_model(tmp_path / "base", build_tokenizer("byte_bpe"), family)
    own, tokenizer = (AutoTokenizer.from_pretrained(base) for _ in range(2))
    tokenizer.add_special_tokens({"additional_special_tokens": NEW_TOKENS})
    settings = lora(modules_to_save=["embed_tokens", "lm_head"])
    tuned = write_any_adapter(base, tmp_path / "adapter", settings, rows=ROWS + 2)
    tokenizer.eos_token = NEW_TOKENS[1]
    tokenizer.save_pretrained(tuned.folder)

    prompts = [f"{NEW_TOKENS[0]}{QUESTIONS[0]}", QUESTIONS[1]]
    with caplog.at_level(logging.WARNING, "tunesmith"):
        folder = evaluate_here(tuned.folder, tmp_path, prompts)
    assert "1 of 2 prompts hold tokens that were added" in caplog.text
    grown = PeftModel.from_pretrained(load(base, rows=ROWS + 2), tuned.folder).eval()
    expected: dict[tuple[str, int], list[int]] = {}
    for n, prompt in enumerate(prompts):
        expected["base", n] = greedy(load(base), own(prompt)["input_ids"], {0})
        expected["tuned", n] = greedy(grown, tokenizer(prompt)["input_ids"], {0, ROWS + 1})
    assert answers(folder) == expected


def test_what_changes_with_each_loading_is_refused_before_anything_is_generated(
    model_of: ModelOf, tmp_path: Path
) -> None:
    tuned = write_any_adapter(
        model_of("llama"), tmp_path / "adapter", lora(init_lora_weights="pissa_niter_4")
    )
    with pytest.raises(ModelError, match="pissa_niter_4: it takes a random decomposition"):
        evaluate_here(tuned.folder, tmp_path, [*QUESTIONS])
    assert not (tmp_path / "evaluation").exists()

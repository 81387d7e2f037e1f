"""Sampled answers: by the seed and the sample alone, and as likely as the model and the settings say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config import ModelRef
from tunesmith.evaluate.engines.base import EngineSpec, Request
from tunesmith.evaluate.engines.choose import make_engine
from tunesmith.evaluate.engines.sampling import sample_seed, sampling_processors

PROMPTS = [tuple(range(5, 5 + length)) for length in (3, 11, 7, 4, 19, 2, 8)]


def answers(model: Path, requests: list[Request], **changes: Any) -> dict[tuple[str, int], tuple[int, ...]]:
    settings: dict[str, Any] = {
        "model": ModelRef(model),
        "adapter": None,
        "dtype": "float32",
        "max_model_len": 64,
        "max_tokens": 12,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "stop_token_ids": (0,),
        "seed": 3,
        "batch_size": 16,
        "num_threads": 1,
    }
    with closing(make_engine("transformers", EngineSpec(**{**settings, **changes}))) as engine:
        found = [each for together in engine.generate(requests) for each in together]
    return {(each.variant, each.sample): each.token_ids for each in found}


def test_a_sampled_answer_is_the_same_in_any_batch_and_any_company(model_of: Callable[[str], Path]) -> None:
    model = model_of("llama")
    requests = [Request(n, "tuned", ids) for n, ids in enumerate(PROMPTS)]
    together = answers(model, requests)
    assert len(set(together.values())) == len(PROMPTS)
    for batch_size in (1, 3):
        assert answers(model, requests, batch_size=batch_size) == together
    assert answers(model, requests[::-1][:4]) == {("tuned", n): together["tuned", n] for n in range(3, 7)}
    assert answers(model, requests, seed=4) != together


def test_equal_prompts_are_answered_by_their_own_seeds(model_of: Callable[[str], Path]) -> None:
    requests = [Request(n, "tuned", PROMPTS[0]) for n in range(6)]
    found = answers(model_of("llama"), requests, temperature=1.5)
    assert len(set(found.values())) == 6


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
    ],
)
def test_tokens_come_as_often_as_they_are_likely(settings: dict[str, Any], expected: list[float]) -> None:
    num_rows = 4000
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    seeds = [sample_seed(1, n) for n in range(num_rows)]
    scores_BV = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().repeat(num_rows, 1)
    ids_BT = torch.zeros(num_rows, 5, dtype=torch.long)
    for process in sampling_processors(seeds, 5, 1, **chosen):
        scores_BV = process(ids_BT, scores_BV)
    counts = Counter(scores_BV.argmax(dim=1).tolist())
    assert [counts[n] / num_rows for n in range(4)] == pytest.approx(expected, abs=0.025)
    assert all(counts[n] == 0 for n, share in enumerate(expected) if share == 0)

"""Predictions and scores of an evaluation that never ran a model: what the tests of tables and pages show."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.paths import REPOSITORY
from tunesmith.evaluate.endings import count_endings
from tunesmith.evaluate.metrics.score import choose_metrics, score_predictions, summarise
from tunesmith.evaluate.results import RULES, Prediction, Scores
from tunesmith.evaluate.verdict import judge

_ENCODER = REPOSITORY / "examples/quickstart/build/all-MiniLM-L6-v2"
_THINGS = ("apples", "pencils", "marbles", "stamps")
_NAMES = ("Natalia", "Weng", "Betty", "Julie")


def minilm_folder() -> Path:
    """Return the folder of a real encoder, MiniLM; skip where it wasn't fetched."""
    if not (_ENCODER / "config.json").is_file():
        pytest.skip("MiniLM is not there: `make model` fetches it")
    return _ENCODER


def make_predictions(num_rows: int, compare: bool = True, seed: int = 0) -> list[Prediction]:
    """Return sums in words: the tuned model is mostly right, the base model talks around it."""
    numbers = random.Random(seed)
    rows: list[Prediction] = []
    for i in range(num_rows):
        name, thing = numbers.choice(_NAMES), numbers.choice(_THINGS)
        a, b = numbers.randint(2, 60), numbers.randint(2, 60)
        right = numbers.random() < 0.6
        said = a + b if right else a + b + numbers.choice((-10, 10, 1))
        rambling = f"To find out how many {thing} {name} has, we look at each day.\n\n" * numbers.randint(
            1, 12
        )
        rows.append(
            Prediction(
                id=i,
                group=i,
                trained=None,
                input=f"{name} had {a} {thing} on Monday and got {b} more on Tuesday. How many has {name} in all?",
                reference=f"{name} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing} in all.\n#### {a + b}",
                reference_reasoning="",
                reasoning="",
                reasoning_ended=True,
                base_reasoning="" if compare else None,
                base_reasoning_ended=True if compare else None,
                prediction=f"{name} has {a} + {b} = <<{a}+{b}={said}>>{said} {thing} in all.\n#### {said}",
                base_prediction=f"{rambling}The answer is {said}." if compare else None,
                scores={},
                base_scores=None,
                finish_reason="stop",
                base_finish_reason=("length" if len(rambling) > 4 * 96 else "stop") if compare else None,
                num_prompt_tokens=31 + i % 7,
                num_tokens=40,
                base_num_tokens=min(96, len(rambling) // 4) if compare else None,
            )
        )
    return rows


def make_scores(
    rows: list[Prediction], metrics: list[str] | None = None, **changes: Any
) -> tuple[Scores, list[Prediction]]:
    """Return `scores.json` and the scored rows, with the real metrics, intervals and verdict."""
    asked = metrics or ["rougeL", "chrf", "exact_match", "numeric_match"]
    chosen, _ = choose_metrics(asked, [row["reference"] for row in rows], None, "cpu")
    scored = score_predictions(rows, chosen)
    summary = summarise(scored, chosen, seed=1)
    compare = rows[0]["base_prediction"] is not None
    finish = {"tuned": {"stop": len(rows)}}
    if compare:
        finish["base"] = dict(Counter(row["base_finish_reason"] for row in rows))
    scores: dict[str, Any] = {
        "format_version": 1,
        "rules": RULES,
        "run": "gsm8k-demo",
        "checkpoint": "checkpoint_00000040",
        "step": 40,
        "why": "lowest validation loss of the run",
        "kind": "adapter",
        "base": "SmolLM2-135M-Instruct",
        "tuned": "gsm8k-demo, step 40",
        "test_set": "runs/datasets/5f2c/test.jsonl",
        "num_samples": len(rows),
        "num_different": len({row["group"] for row in rows}),
        "num_skipped": 0,
        "first_rows": None,
        "rows_left_out": {},
        "trained_on": {"rows": 0, "prompts": 0},
        "engine": {"name": "transformers", "version": "5.19.0", "dtype": "bfloat16", "num_replicas": 1},
        "generation": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_tokens": 96, "seed": 16257},
        "loss": {"base": 3.0412 if compare else None, "tuned": 2.1307},
        "metrics": summary,
        "left_out": {"bertscore": "BERTScore's encoder `roberta-large` can't be had"},
        "throughput": {"samples": (1 + compare) * len(rows), "tokens": 96 * len(rows), "seconds": 30.1},
        "finish": finish,
        "endings": {variant: count_endings(scored, variant, 96) for variant in finish},
        "verdict": judge(summary),
    }
    return Scores(**{**scores, **changes}), scored  # type: ignore[typeddict-item]

"""Rows that are conversations, and what becomes of them."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerFast

from support.labels import spell
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.formats import Findings, Prompt, choose_format

USER, ASSISTANT = "user", "assistant"
DATE = "2026-01-31"
GREETING = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧"


def say(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def call(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: str) -> dict[str, Any]:
    typed = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": typed}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def settings_of(**given: Any) -> TrainConfig:
    return TrainConfig(dataset_name="rows.jsonl", **given)


def encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **given: Any
) -> tuple[list[str], Findings]:
    chosen = choose_format(settings_of(**given), row, "`rows.jsonl` (train)")
    findings = Findings()
    (examples,) = chosen.with_tokenizer(tokenizer, DATE).encode([chosen.render(row, "line 1")], findings)
    return [spell(tokenizer, segment) for example in examples for segment in example.segments], findings


def trained(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None, **given: Any) -> list[str]:
    """Return the trained stretches of the row's only example."""
    (text,) = encode(row, tokenizer or build_tokenizer("chatml"), **given)[0]
    return re.findall("⟦(.*?)⟧", text, re.DOTALL)


def prompt_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **given: Any) -> Prompt:
    chosen = choose_format(settings_of(**given), row, "`rows.jsonl` (train)")
    prompt = chosen.with_tokenizer(tokenizer, DATE).prompt(chosen.render(row, "line 1"))
    assert prompt is not None
    return prompt

"""Every example of the page `docs/data.md` is read and trained as the page says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from support.labels import spell
from support.paths import REPOSITORY
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.formats import Findings, choose_format

PAGE = (REPOSITORY / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"```jsonl([^\n]*)\n(.*?)```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)


def settings_of(options: str) -> dict[str, Any]:
    found = re.search(r'settings="(.*)"', options)
    return yaml.safe_load("{" + found[1] + "}") if found else {}


def test_every_block_of_rows_is_an_example() -> None:
    assert len(EXAMPLES) == PAGE.count("```jsonl") > 6


@pytest.mark.parametrize(("options", "lines", "shown"), EXAMPLES)
def test_an_example_is_trained_as_the_page_says(options: str, lines: str, shown: str) -> None:
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 2
    config = TrainConfig(dataset_name="rows.jsonl", **settings_of(options))
    chosen = choose_format(config, rows[0], "rows.jsonl")
    tokenizer = build_tokenizer("chatml")
    rendered = [chosen.render(row, f"line {i}") for i, row in enumerate(rows, start=1)]
    first, second = chosen.with_tokenizer(tokenizer, "2026-01-31").encode(rendered, Findings())
    assert [spell(tokenizer, segment) for example in first for segment in example.segments] == [shown]
    assert second

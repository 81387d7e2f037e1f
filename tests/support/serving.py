"""Runs to talk to and to serve: sums in words, as templates and as conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.runs import small_config, start, train_here
from tunesmith.config import TrainConfig
from tunesmith.runs.folder import RunDir


def write_chats(rows: Path, path: Path) -> Path:
    """Write the rows of questions and answers as conversations."""
    with path.open("w") as file:
        for row in map(json.loads, rows.read_text().splitlines()):
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def train_on_rows(model: Path, rows: Path, home: Path, **changes: Any) -> RunDir:
    """Train with templates, long enough for answers to differ from the base model's."""
    return train_here(start(small_config(model, rows, home, **{**_STEPS, **changes})))


def train_on_chats(model: Path, chats: Path, home: Path, **changes: Any) -> RunDir:
    """Train on conversations."""
    given = small_config(model, chats, home, **{**_STEPS, **changes}).model_dump(exclude_unset=True)
    kept = {name: value for name, value in given.items() if name not in _OF_TEMPLATES}
    return train_here(start(TrainConfig(**kept)))


_STEPS = {"max_steps": 12, "save_steps": 12, "eval_steps": 12}
_OF_TEMPLATES = ("input_template", "output_template", "field_mapping")

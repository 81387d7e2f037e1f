"""Two small runs that the tests of chat and server share, and leave as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.own_templates import OWN_TEMPLATES
from support.serving import train_on_chats, train_on_rows, write_chats
from support.tiny_models import save_model
from tunesmith.runs.folder import RunDir


@pytest.fixture(scope="session")
def of_templates(
    model_of: Callable[[str], Path], rows: Path, tmp_path_factory: pytest.TempPathFactory, alone: None
) -> RunDir:
    """`sums`, trained with templates on the tiny Llama."""
    home = tmp_path_factory.mktemp("templates")
    return train_on_rows(model_of("llama"), rows, home, run_name="sums", train_split_ratio=0.8)


@pytest.fixture(scope="session")
def of_chats(rows: Path, tmp_path_factory: pytest.TempPathFactory, alone: None) -> RunDir:
    """`talk`, trained on conversations with a system prompt; its base lies in the folder `base` beside its home."""
    folder = tmp_path_factory.mktemp("chats")
    model = save_model(folder / "base", OWN_TEMPLATES["phi4"].build_tokenizer())
    (model / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.6}')
    chats = write_chats(rows, folder / "chats.jsonl")
    steps = {"max_steps": 24, "save_steps": 12, "eval_steps": 12, "save_total_limit": 3}
    return train_on_chats(
        model, chats, folder / "home", run_name="talk", system_prompt="Add.", train_split_ratio=0.8, **steps
    )


@pytest.fixture(scope="session")
def of_whole(
    model_of: Callable[[str], Path], rows: Path, tmp_path_factory: pytest.TempPathFactory, alone: None
) -> RunDir:
    """A full fine-tuning of the tiny Llama."""
    home = tmp_path_factory.mktemp("whole")
    return train_on_rows(model_of("llama"), rows, home, full_ft=True, learning_rate=1e-3)

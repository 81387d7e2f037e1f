"""A tokenizer may have more tokens than its model has embeddings, as long as the data don't use them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from support.runs import small_config, start, train_here, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.cli import main
from tunesmith.config import ModelRef
from tunesmith.data.prepare import open_prepared
from tunesmith.model.load import load_tokenizer
from tunesmith.model.vocabulary import check_data_tokens, check_prompt_tokens
from tunesmith.train.start import check_model


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer was given a token more."""
    folder = tmp_path_factory.mktemp("short")
    tokenizer = copy.deepcopy(build_tokenizer("byte_bpe"))
    save_model(folder, tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    return folder


def _write(path: Path, text: str, key: str = "text") -> Path:
    rows = ({key: text.format(i=i), "output": "yes"} for i in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_rows_with_a_token_that_the_model_lacks_are_refused_before_workers_start(
    verb: str, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _write(tmp_path / "rows.jsonl", "so <extra> it is {i}")
    words = f"--model_path={short} --dataset_name={rows} --home={tmp_path / 'home'} --max_seq_length=64"

    code = main([verb, *words.split(), "--num_train_epochs=1", "--num_proc=1"])

    printed = capsys.readouterr().err
    assert code == 2, printed
    assert "token 506, `<extra>`, is in the data, in 36 examples" in printed
    assert "embeddings for 506 tokens" in printed


def test_rows_without_it_train(short: Path, tmp_path: Path, alone: None) -> None:
    config = small_config(short, write_rows(tmp_path / "rows.jsonl"), tmp_path / "home", max_steps=1)
    job = start(config)
    prepared = open_prepared(job.prepared_path)

    check_data_tokens(
        (prepared.train, prepared.validation), load_tokenizer(config.model), check_model(config), "short"
    )
    assert train_here(job).latest_checkpoint() is not None


def test_prompts_with_it_are_refused(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _write(tmp_path / "rows.jsonl", "is it <extra>?", "input")

    code = main(["evaluate", str(short), f"--test_dataset={rows}", f"--home={tmp_path / 'home'}"])

    printed = capsys.readouterr().err
    assert code == 2, printed
    assert "token 506, `<extra>`, is in the test set, in 40 prompts" in printed
    check_prompt_tokens([[0, 505]], load_tokenizer(ModelRef(short)), 506, "short")

"""Where positions are a table, its end is found from the model, whatever its family calls it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.runs import write_rows
from support.tokenizers import build_tokenizer
from tunesmith.cli import main
from tunesmith.errors import ConfigError
from tunesmith.model.positions import check_length, find_position_limit

_POSITIONS = 16
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": _POSITIONS}
_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": _POSITIONS,
}
_BART = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "opt": {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bert": {**_BERT, "is_decoder": True},
    "roberta": {**_BERT, "is_decoder": True},
    "bart": {**_BART, "max_position_embeddings": _POSITIONS, "is_decoder": True, "is_encoder_decoder": False},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": _POSITIONS},
    # Beyond these there is no end.
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 1, "attention_heads": 4, "max_position_embeddings": _POSITIONS},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "llama": _BERT,
}  # fmt: skip


def _build(family: str, device: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=50, **FAMILIES[family])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


def _takes(model: Any, length: int) -> bool:
    try:
        with torch.inference_mode():
            model(input_ids=torch.full((1, length), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limit_is_the_longest_that_the_model_takes(family: str) -> None:
    limit = find_position_limit(_build(family, "meta"))
    model = _build(family, "cpu")

    if limit is None:
        assert _takes(model, 4 * _POSITIONS)
    else:
        assert _takes(model, limit)
        assert not _takes(model, limit + 1)


@pytest.mark.parametrize("verb", ["train", "plan", "evaluate"])
def test_each_verb_refuses_lengths_beyond_a_table_by_the_setting_s_name(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer("byte_bpe")
    shape = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "n_positions": 64}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, **shape)
    ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = write_rows(tmp_path / "rows.jsonl")
    words = {
        "evaluate": [f"{tmp_path}/gpt2", f"--test_dataset={rows}", "--max_model_len=65"],
        "train": [f"--model_path={tmp_path}/gpt2", f"--dataset_name={rows}"],
        "plan": [f"--model_path={tmp_path}/gpt2"],
    }
    templates = ["--input_template={question}", "--output_template={answer}"] if verb == "train" else []

    assert main([verb, *words[verb], *templates, f"--home={tmp_path / 'home'}"]) == 2

    printed = capsys.readouterr().err
    setting, length = ("max_model_len", 65) if verb == "evaluate" else ("max_seq_length", 2048)
    assert f"`{setting}` is {length}, and `{tmp_path}/gpt2` has a table of 64 positions" in printed
    assert f"--{setting} 64" in printed.split("hint: ")[1]


def test_lengths_beyond_a_table_are_refused_and_beyond_rotary_positions_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table, rotary = _build("gpt2", "meta"), _build("llama", "meta")

    check_length(table, _POSITIONS, "max_seq_length", "gpt2")
    assert not caplog.records
    with pytest.raises(ConfigError, match="`max_seq_length` is 17") as raised:
        check_length(table, _POSITIONS + 1, "max_seq_length", "gpt2")
    assert raised.value.hint is not None and "--max_seq_length 16" in raised.value.hint

    with caplog.at_level(logging.WARNING):
        check_length(rotary, _POSITIONS + 1, "max_seq_length", "llama")
    assert "made for 16 positions" in caplog.text

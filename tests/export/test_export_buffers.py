"""What a model computes beside its weights, in its own type, is no difference between an export and what was tuned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.families import family_model
from support.runs import small_config, start, train_here
from support.tokenizers import build_tokenizer
from tunesmith.config import ConvertConfig
from tunesmith.export.convert import export
from tunesmith.runs.tuned import find_tuned

pytestmark = [pytest.mark.usefixtures("alone")]


@pytest.mark.parametrize("full_ft", [True, False])
def test_a_bfloat16_model_that_scales_its_embeddings_is_exported_and_proven(
    full_ft: bool, rows: Path, tmp_path: Path
) -> None:
    """Gemma's scale, the root of its width, is no number of bfloat16."""
    tokenizer = build_tokenizer("byte_bpe")
    model = family_model("gemma2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = small_config(
        tmp_path / "base", rows, tmp_path, max_steps=1, save_steps=1, eval_steps=0, full_ft=full_ft
    )
    run = train_here(start(config))
    proof = export(
        find_tuned(ConvertConfig(checkpoints_dir=str(run.path))), ConvertConfig(), tmp_path / "out"
    ).proof
    assert proof is not None
    assert proof.way == "whole"
    assert proof.num_inexact == 0

"""The transformers engine computes what `from_pretrained` does in the same dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.families import family_model
from tunesmith.config import ModelRef
from tunesmith.evaluate.engines.base import EngineSpec
from tunesmith.evaluate.engines.transformers import TransformersEngine

pytestmark = [pytest.mark.usefixtures("alone")]

FAR = 2000
FAMILIES = ("llama", "qwen3", "phi3", "gemma", "gemma2", "gemma3", "gpt_oss", "phi")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_far_positions_are_as_exact_as_those_of_transformers(
    family: str, stored: torch.dtype, tmp_path: Path
) -> None:
    family_model(family, max_position_embeddings=2 * FAR).to(stored).save_pretrained(tmp_path)
    engine = TransformersEngine(spec_of(tmp_path))
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=engine._model.config._attn_implementation
    ).eval()
    assert {weight.dtype for weight in engine._model.parameters()} == {torch.bfloat16}
    ids_BT = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(FAR - 23, FAR + 1).unsqueeze(0)
    with torch.no_grad():
        mine, its = (
            model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
            for model in (engine._model, expected)
        )
    assert torch.equal(mine, its)


def spec_of(model: Path) -> EngineSpec:
    return EngineSpec(
        ModelRef(model), None, "bfloat16", max_model_len=64, max_tokens=8, temperature=0, top_k=0, top_p=1,
        stop_token_ids=(0,), seed=0, batch_size=2,
    )  # fmt: skip

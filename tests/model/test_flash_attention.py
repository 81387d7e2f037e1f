"""FlashAttention is chosen where it is installed, and told where examples begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from support.families import family_config, family_model
from tunesmith.model.attention_choice import choose_attention
from tunesmith.model.kernels.attention import compute_logits
from tunesmith.planning.dry_run import make_batch

NAMES = ("flash_attention_2_told", "flash_attention_4_told", "kernels-community/flash-attn3-told")


def test_another_flash_attention_of_the_same_name_is_not_taken_for_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)  # as flash-attn-4 lies on the disk
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_attention(family_config("llama"), "cuda", True, "auto", lambda: True) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("is_flat", "is_told"), [(True, True), (False, False)])
def test_where_examples_begin_is_handed_to_every_layer(is_flat: bool, is_told: bool, name: str) -> None:
    handed: list[dict[str, Any]] = []

    def attend(module: Any, query: Tensor, *states: Any, **options: Any) -> tuple[Tensor, None]:
        handed.append(options)
        return query.transpose(1, 2), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["flash_attention_2"])
    model = family_model("llama")
    model.config._attn_implementation = name
    compute_logits(model, make_batch(24, 8, is_flat, device_type="cpu"))
    assert len(handed) == model.config.num_hidden_layers
    for options in handed:
        given = [options.get(key) for key in ("max_length_q", "max_length_k")]
        assert given == ([8, 8] if is_told else [None, None])
        for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
            starts = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
            assert torch.equal(options[key], starts) if is_told else options.get(key) is None

"""Whatever a model does to its scores, its positions and its logits: what trains is the model, and is planned as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from support.families import EVERY_FAMILY, LENGTH, family_model
from support.long import long_but
from support.runs import small_config
from tunesmith.data.batches import Batch
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.loss import sum_cross_entropy
from tunesmith.model.load import attention_of, load_model_config
from tunesmith.model.probe import keeps_examples_apart
from tunesmith.parallel.activation_checkpointing import count_recomputed
from tunesmith.parallel.mesh import build_mesh
from tunesmith.planning.attention import find_attention, own_attention
from tunesmith.planning.dry_run import fuses_loss_on_meta
from tunesmith.planning.layout import plan_layout
from tunesmith.planning.memory import build_planned_model
from tunesmith.train.build import build_model, choose_ways

pytestmark = [pytest.mark.usefixtures("alone")]

CPU = torch.device("cpu")
# Their own code tells packed examples apart by nothing: they are trained padded.
NOT_PACKED = {
    "biogpt", "bloom", "falcon", "falcon_alibi", "gpt_oss", "llama4", "mpt",
}  # fmt: skip
# transformers 5.19 adds Falcon's biases twice where it attends eagerly.
EAGERLY_WRONG = {"falcon_alibi"}
# One of each kind: plain, windows, caps of scores and logits, sinks, positions of a table, biases, chunks.
KEPT = ("llama", "mistral", "gemma2", "cohere", "gpt_oss", "gpt2", "bloom", "llama4")
CAPPED = {"cohere", "cohere2", "gemma2", "granite"}


@pytest.mark.parametrize("family", long_but(KEPT, EVERY_FAMILY))
def test_every_family_trains_as_it_attends_eagerly_and_is_planned_so(
    family: str, rows: Path, tmp_path: Path
) -> None:
    family_model(family).save_pretrained(tmp_path / "model")
    config = small_config(tmp_path / "model", rows, tmp_path, max_seq_length=LENGTH)
    model: Any = build_model(config, CPU, build_mesh(0, 1))
    fused = choose_ways(config, model, CPU)
    assert fused == (family not in CAPPED)
    model.eval()
    examples = [random_ids(18, 1), random_ids(22, 2)]
    way = "sdpa" if family in EAGERLY_WRONG else "eager"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=way).eval()
    expected = sum(plain_loss(plain, ids_T) for ids_T in examples)
    alone = sum(float(sum_cross_entropy(model, pack([ids_T]), fused)) for ids_T in examples)
    assert alone == pytest.approx(expected, rel=1e-5)
    is_packed = attention_of(model) == VARLEN or keeps_examples_apart(model, CPU, torch.float32)
    assert is_packed == (family not in NOT_PACKED)
    if is_packed:
        packed = float(sum_cross_entropy(model, pack(examples), fused))
        assert packed == pytest.approx(expected, rel=1e-5)

    planned = build_planned_model(config, load_model_config(config.model), torch.float32)
    layout, memory = plan_layout(planned, config, "cpu", 1, 1 << 40)
    own = own_attention(planned.model, planned.built_with, config, "cpu", torch.float32)
    attention = find_attention(planned.model, own, config, "cpu", torch.float32)
    assert attention == attention_of(model)
    assert fuses_loss_on_meta(planned.model) == fused
    assert (layout.num_recomputed, max(1, layout.num_blocks)) == count_recomputed(model)
    assert memory.logits > 0


def random_ids(length: int, seed: int) -> Tensor:
    return torch.randint(300, (length,), generator=torch.Generator().manual_seed(seed))


def plain_loss(model: Any, ids_T: Tensor) -> float:
    with torch.no_grad():
        logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
    return float(F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="sum"))


def pack(examples: list[Tensor]) -> Batch:
    """Return a row of examples, of which every token but the first is trained."""
    ids_T = torch.cat(examples)
    starts = torch.tensor([0, *(len(ids_T) for ids_T in examples)]).cumsum(0).tolist()
    positions = [p for first, end in itertools.pairwise(starts) for p in range(first, end - 1)]
    return Batch(
        ids_T.unsqueeze(0),
        torch.cat([torch.arange(len(example)) for example in examples]).unsqueeze(0),
        torch.tensor(positions),
        ids_T[torch.tensor(positions) + 1],
        torch.tensor(starts, dtype=torch.int32),
        max(map(len, examples)),
    )


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({"new_tokens": "<|im_start|>,<|im_end|>"}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, False),
    ],
    ids=str,
)
def test_what_is_trained_of_the_head_is_planned_as_it_is(
    settings: dict[str, Any], fused: bool, model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of("qwen3"), rows, tmp_path, **settings)
    planned = build_planned_model(config, load_model_config(config.model), torch.float32)
    assert fuses_loss_on_meta(planned.model) == fused
    assert choose_ways(config, build_model(config, CPU, build_mesh(0, 1)), CPU) == fused

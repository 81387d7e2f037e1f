"""Tuned models to export, and what others' code makes of them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.config import ConvertConfig, ModelRef
from tunesmith.export.convert import export
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import TunedModel, find_tuned


def tuned_of(run: RunDir, checkpoint: str = "best") -> TunedModel:
    return find_tuned(ConvertConfig(checkpoints_dir=str(run.path), checkpoint=checkpoint))


def write_adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> TunedModel:
    """Let PEFT write an adapter with random weights, as large as the base model's own."""
    return write_any_adapter(base, folder, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}), seed=seed)


def write_any_adapter(
    base: Path,
    folder: Path,
    settings: PeftConfig,
    seed: int = 0,
    rows: int | None = None,
    save_embedding_layers: bool | str = "auto",
    start: float = 0.0,
) -> TunedModel:
    """Let PEFT write an adapter of any kind, on embeddings of `rows` rows if that is given.

    Random weights take the place of those that it began with, or are added to `start` times those.
    """
    torch.manual_seed(seed)
    # PEFT writes into the settings that it is given.
    adapted = get_peft_model(load(base, rows=rows), deepcopy(settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(start * parameter + torch.randn_like(parameter) * 0.15)
    adapted.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return TunedModel("adapter", folder, ModelRef(base))


def convert(tuned: TunedModel, output: Path, **settings: Any) -> Path:
    """Export without the proof, which is asked for where it is meant."""
    return export(tuned, ConvertConfig(**{"verify": False, **settings}), output).folder


def load(folder: Path, dtype: Any = torch.float32, rows: int | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def load_adapted(base: Path, adapter: Path) -> Any:
    """Return base and adapter in float32; head and embeddings are apart, as PEFT's merge needs them."""
    model = load(base)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return PeftModel.from_pretrained(model, adapter).eval()


def merge_by_peft(base: Path, adapter: Path) -> Any:
    return load_adapted(base, adapter).merge_and_unload()


@torch.no_grad()
def logits_of(model: Any, vocab_size: int = 250) -> torch.Tensor:
    ids_BT = torch.randint(vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids_BT).logits.float()


def assert_same_weights(folder: Path, reference: Any, dtype: torch.dtype) -> None:
    """Check that a folder's model is `reference` rounded to `dtype`, give or take one unit of rounding."""
    exported, expected = load(folder, dtype).state_dict(), reference.state_dict()
    assert exported.keys() == expected.keys()
    for name, found in exported.items():
        rounded = expected[name].to(dtype)
        unit = torch.finfo(dtype).eps * rounded.abs().float()
        assert bool(((found.float() - rounded.float()).abs() <= unit).all()), name

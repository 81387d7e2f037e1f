"""What tells one model from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.exports import convert, write_adapter
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.model.files.fingerprint import model_fingerprint

WEIGHTS = "model.safetensors"
AS_RECORDED_AT_FIRST = "0" * 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head and embeddings alone fill more than a MiB."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shape = {"hidden_size": 1024, "intermediate_size": 16, "num_hidden_layers": 1}
    return save_model(folder, build_tokenizer("byte_bpe"), "qwen3", **shape)


def test_a_base_and_its_merged_export_are_told_apart(base: Path, tmp_path: Path) -> None:
    tuned = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    shutil.copytree(base, tmp_path / "export")
    shutil.copy(convert(tuned, tmp_path / "merged") / WEIGHTS, tmp_path / "export")
    first_mib = [(folder / WEIGHTS).read_bytes()[: 1 << 20] for folder in (base, tmp_path / "export")]
    assert first_mib[0] == first_mib[1]
    assert model_fingerprint(ModelRef(base)) != model_fingerprint(ModelRef(tmp_path / "export"))


@pytest.mark.parametrize("place", ["begin", "middle", "end"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_change_of_a_tensor_shows(name: str, place: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "changed")
    weights = load_file(base / WEIGHTS)
    numbers = weights[name].view(-1)
    part = {
        "begin": slice(4),
        "middle": slice(numbers.numel() // 2, numbers.numel() // 2 + 4),
        "end": slice(-4, None),
    }
    numbers[part[place]] += 1
    save_file(weights, tmp_path / "changed" / WEIGHTS, metadata={"format": "pt"})
    assert model_fingerprint(ModelRef(tmp_path / "changed")) != model_fingerprint(ModelRef(base))


def test_a_copy_is_the_same_model_and_pickled_weights_are_sampled_too(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    assert model_fingerprint(ModelRef(copy)) == model_fingerprint(ModelRef(base))
    weights = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    before = model_fingerprint(ModelRef(copy))
    weights["model.layers.0.self_attn.q_proj.weight"] += 1
    torch.save(weights, copy / "pytorch_model.bin")
    assert model_fingerprint(ModelRef(copy)) != before


def test_a_fingerprint_is_made_like_the_one_it_is_compared_with(base: Path) -> None:
    ref = ModelRef(base)
    ours, at_first = model_fingerprint(ref), model_fingerprint(ref, like=AS_RECORDED_AT_FIRST)
    assert (ours.partition("-")[0], len(at_first)) == ("v2", 16)
    assert model_fingerprint(ref, like=ours) == ours
    assert model_fingerprint(ref, like=at_first) == at_first

"""The proof of an export: it passes what is equal, and catches what isn't."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.exports import convert, load_weights, tuned_of, write_adapter
from support.runs import small_config, start, train_here
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ConvertConfig, ModelRef
from tunesmith.errors import ExportError
from tunesmith.export.compare import count_inexact
from tunesmith.export.convert import export
from tunesmith.export.folder import new_folder
from tunesmith.export.merge import open_merge
from tunesmith.export.prompts import choose_prompts
from tunesmith.export.sample import prove_by_sample
from tunesmith.export.verify import prove, prove_whole
from tunesmith.runs.tuned import TunedModel

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

ModelOf = Callable[[str], Path]

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def prove_here(tuned: TunedModel, folder: Path, by_sample: bool = False) -> Any:
    assert tuned.base is not None
    merge = open_merge(tuned, tuned.base, None)
    return prove_by_sample(merge, folder) if by_sample else prove_whole(merge, tuned, tuned.base, folder)


def change_byte(path: Path, name: str, byte: int) -> None:
    """Flip the lowest bits of one byte of a tensor in a safetensors file."""
    tensors = load_file(path)
    tensors[name].view(torch.uint8).reshape(-1)[byte] ^= 0x7F
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_flipped_byte_is_caught_and_nothing_is_put_in_place(
    family: str, dtype: torch.dtype, by_sample: bool, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", build_tokenizer("byte_bpe"), family, dtype)
    settings = EXPERTS if family == "mixtral" else {"target_modules": ["q_proj", "o_proj"]}
    tuned = write_adapter(base, tmp_path / "adapter", **settings)
    good = convert(tuned, tmp_path / "good")
    prove_here(tuned, good, by_sample)

    name = next(name for name in load_weights(good) if name.endswith(("w2.weight", "o_proj.weight")))
    output = tmp_path / "out"

    def write_damaged() -> None:
        with new_folder(output, overwrite=False, sources=[]) as folder:
            shutil.copytree(good, folder, dirs_exist_ok=True)
            change_byte(folder / "model.safetensors", name, 1001)
            prove_here(tuned, folder, by_sample)

    with pytest.raises(ExportError, match="isn't the tuned model") as error:
        write_damaged()
    assert error.value.exit_code == 1
    assert not output.exists()
    assert list(tmp_path.glob(".out_*")) == []


@pytest.mark.parametrize("full_ft", [False, True])
def test_a_model_too_large_for_the_memory_is_checked_by_samples_and_it_says_so(
    full_ft: bool,
    model_of: ModelOf,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tuned = tuned_of(train_here(start(small_config(model_of("phi3"), rows, tmp_path, full_ft=full_ft))))
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(100_000))
    with caplog.at_level(logging.INFO, "tunesmith"):
        exported = export(tuned, ConvertConfig(max_shard_size="100KB"), tmp_path / "out")
    assert exported.proof is not None
    assert exported.proof.way == "sampled"
    assert exported.proof.num_weights > 1000
    assert "a sample of the weights is checked" in caplog.text
    assert "a sample of" in exported.describe()


def test_a_missing_tensor_is_caught(model_of: ModelOf, tmp_path: Path) -> None:
    tuned = write_adapter(model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj"])
    folder = convert(tuned, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for by_sample in (False, True):
        with pytest.raises(ExportError, match=r"model\.norm\.weight"):
            prove_here(tuned, folder, by_sample)


def test_an_adapter_of_another_model_of_the_same_shape_is_not_the_same(
    model_of: ModelOf, tmp_path: Path
) -> None:
    tuned = write_adapter(model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj"])
    other = write_adapter(model_of("qwen3"), tmp_path / "other", seed=1, target_modules=["q_proj"])
    folder = convert(other, tmp_path / "out")
    for by_sample in (False, True):
        with pytest.raises(ExportError, match="differs in"):
            prove_here(tuned, folder, by_sample)


def test_rounding_that_changes_tokens_is_told_with_what_helps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_model(tmp_path / "base", build_tokenizer("byte_bpe"), "mistral")
    tuned = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj", "lm_head"])
    assert tuned.base is not None
    with caplog.at_level(logging.INFO, "tunesmith"):
        exported = export(tuned, ConvertConfig(dtype="bfloat16"), tmp_path / "out")
    proof = exported.proof
    assert proof is not None and proof.num_positions is not None
    assert proof.num_flips is not None and 0 < proof.num_flips < proof.num_positions / 2
    assert "--dtype float32 keeps it" in caplog.text
    assert f"at {proof.num_flips} of {proof.num_positions} positions" in exported.describe()


def test_prompts_are_rows_of_the_runs_test_set(model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    run = train_here(start(small_config(model_of("llama"), rows, tmp_path)))
    tuned = tuned_of(run)
    tokenizer = build_tokenizer("byte_bpe")
    texts = [tokenizer.decode(ids_BT[0]) for ids_BT in choose_prompts(tuned, tuned.folder)]
    assert len(texts) == 3
    assert all(" plus " in text for text in texts)
    shutil.rmtree(run.datasets_path)
    assert len(choose_prompts(tuned, tuned.folder)) == 8


def test_a_unit_of_rounding_is_allowed_and_no_more() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = torch.tensor([1.0, -1.0, 0.0, 3e-3, 100.0], dtype=dtype)
        assert count_inexact("x", expected.clone(), expected) == 0
        step = torch.finfo(dtype).eps
        near = expected * torch.tensor([1 + step, 1, 1, 1, 1], dtype=dtype)
        assert count_inexact("x", near, expected) == 1
        far = expected + torch.tensor([0, -20 * step, 0, 0, 0], dtype=dtype)
        if dtype != torch.float32:
            with pytest.raises(ExportError, match="differs in 1 of 5 weights"):
                count_inexact("x", far, expected)
    # Below and above zero are neighbours of zero.
    tiny = torch.finfo(torch.bfloat16).smallest_normal
    assert count_inexact("x", torch.tensor([-0.0, tiny]), torch.tensor([0.0, tiny])) == 0


def test_a_proof_of_a_whole_model_needs_no_base(model_of: ModelOf, tmp_path: Path) -> None:
    tuned = TunedModel("model", model_of("gemma"), None)
    files = ModelRef(model_of("gemma"))
    folder = convert(tuned, tmp_path / "out", dtype="bfloat16")
    proof = prove(open_merge(tuned, files, torch.bfloat16), tuned, files, folder)
    assert proof.way == "whole"
    assert proof.distance is not None and proof.distance > 0

"""A model that comes quantized trains on its dequantized weights, or is refused before anything is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from support.runs import losses, small_config, start, train_here
from tunesmith.cli import main
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.load import load_model
from tunesmith.train.start import check_model

ModelOf = Callable[[str], Path]
BLOCK = 16


def write_model(folder: Path, like: Path, weights: dict[str, torch.Tensor], **changes: Any) -> Path:
    """Write the model `like` with these weights, and changes of its configuration."""
    folder.mkdir()
    config = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def write_fp8_and_plain(folder: Path, like: Path) -> tuple[Path, Path]:
    """Write a model in e4m3 with a scale for each block of 16 × 16, and what it stands for, in bfloat16."""
    stored, plain = {}, {}
    for name, weight in load_file(like / "model.safetensors").items():
        plain[name] = stored[name] = weight.bfloat16()
        if name.endswith("_proj.weight"):
            rows, columns = (size // BLOCK for size in weight.shape)
            blocks = weight.view(rows, BLOCK, columns, BLOCK)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            codes = (blocks / scales).to(torch.float8_e4m3fn)
            stored[name] = codes.view_as(weight)
            stored[f"{name}_scale_inv"] = scales.view(rows, columns)
            plain[name] = (codes.float() * scales).view_as(weight).bfloat16()
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return (
        write_model(folder / "fp8", like, stored, dtype="bfloat16", quantization_config=settings),
        write_model(folder / "plain", like, plain, dtype="bfloat16"),
    )


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("full_ft", [False, True])
def test_an_fp8_model_trains_on_its_dequantized_weights(
    full_ft: bool, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    runs = []
    for folder in write_fp8_and_plain(tmp_path, model_of("llama")):
        config = small_config(
            folder, rows, tmp_path / f"{folder.name} home", dtype="bfloat16", max_steps=2, full_ft=full_ft
        )
        check_model(config)
        runs.append(losses(train_here(start(config))))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_ways_to_quantize_are_refused_by_name(
    method: str, model_of: ModelOf, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like = model_of("llama")
    weights = load_file(like / "model.safetensors")
    folder = write_model(tmp_path / "model", like, weights, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=method):
        check_model(small_config(folder, rows, tmp_path))
    with pytest.raises(ModelError, match=method):
        load_model(ModelRef(folder), torch.device("cpu"), torch.float32)
    assert main(["plan", f"--model_path={folder}", "--gpu=H100"]) == 2
    assert method in capsys.readouterr().err

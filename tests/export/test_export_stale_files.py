"""A folder with more weight files than one set: what transformers reads is what is checked and exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.exports import convert, load, load_weights
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.load import check_weights
from tunesmith.runs.tuned import TunedModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base", build_tokenizer("byte_bpe"), "qwen3")


def write_shards(folder: Path, weights: dict[str, torch.Tensor], index: str, names: tuple[str, str]) -> None:
    """Write weights in two files, and the index that names them."""
    where = {tensor: names[number % 2] for number, tensor in enumerate(sorted(weights))}
    for name in names:
        part = {tensor: weights[tensor] for tensor in where if where[tensor] == name}
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".bin"):
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def add_set(folder: Path, kind: str, added: float) -> None:
    """Write one more whole set of weights, each larger by `added` than the base's."""
    weights = {name: tensor + added for name, tensor in load_file(folder / "base.st").items()}
    match kind:
        case "single":
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        case "sharded":
            write_shards(
                folder,
                weights,
                INDEX,
                ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            )
        case "pickled":
            torch.save(weights, folder / PICKLED)
        case "pickled shards":
            write_shards(folder, weights, PICKLED_INDEX, ("pytorch_model-1.bin", "pytorch_model-2.bin"))
        case "subfolder":
            write_shards(folder, weights, INDEX, ("parts/a.safetensors", "parts/b.safetensors"))
        case "variant":
            save_file(weights, folder / "model.fp16.safetensors", metadata={"format": "pt"})
        case "consolidated":
            save_file(weights, folder / "consolidated.safetensors", metadata={"format": "pt"})
        case "named":
            save_file(weights, folder / "own.safetensors", metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps({**config, "transformers_weights": "own.safetensors"})
            )


def without_weights(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    (folder / WEIGHTS).rename(folder / "base.st")
    return folder


@pytest.mark.parametrize(
    "kinds",
    [
        ("single", "sharded"),
        ("single", "pickled", "pickled shards"),
        ("sharded", "pickled"),
        ("pickled", "pickled shards"),
        ("pickled shards", "variant"),
        ("single", "variant", "consolidated"),
        ("subfolder", "consolidated"),
        ("named", "single", "sharded"),
        ("single", "sharded", "pickled", "pickled shards"),
    ],
    ids=" ".join,
)
def test_the_files_that_transformers_reads_are_exported(
    kinds: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    folder = without_weights(base, tmp_path / "base")
    for number, kind in enumerate(kinds):
        add_set(folder, kind, float(number))
    check_weights(ModelRef(folder))
    expected = load(folder).state_dict()
    assert torch.equal(expected["model.norm.weight"], load(base).state_dict()["model.norm.weight"]), (
        "the first"
    )
    exported = convert(TunedModel("model", folder, None), tmp_path / "out")
    found = load(exported).state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert not [path for path in exported.iterdir() if path.name in (INDEX, PICKLED, PICKLED_INDEX)]


def test_stale_files_may_be_torn_but_those_that_are_read_may_not(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"torn")
    (folder / INDEX).write_text("not JSON")
    check_weights(ModelRef(folder))
    assert load_weights(convert(TunedModel("model", folder, None), tmp_path / "out")).keys()
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"index\.json` isn't valid JSON"):
        check_weights(ModelRef(folder))


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: check_weights(ModelRef(folder)),
        lambda folder: convert(TunedModel("model", folder, None), folder.with_name("out")),
    ],
    ids=["check", "convert"],
)
def test_an_index_that_names_an_absent_file_is_one_error(
    read: Callable[[Path], None], base: Path, tmp_path: Path
) -> None:
    folder = without_weights(base, tmp_path / "base")
    add_set(folder, "sharded", 0.0)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        read(folder)
    assert f"{INDEX}` names the weight file `model-00002-of-00002.safetensors`" in error.value.message
    assert error.value.hint is not None
    assert not folder.with_name("out").exists()

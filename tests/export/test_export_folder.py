"""An export appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support.exports import convert, load_weights, write_adapter
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.errors import ExportError, ModelError, ResourceError, RunError
from tunesmith.export.folder import new_folder
from tunesmith.model.files.tensor_files import TensorFile, write_tensors
from tunesmith.runs.tuned import TunedModel

pytestmark = pytest.mark.slow

ModelOf = Callable[[str], Path]

CONVERT = """
import sys
from pathlib import Path
from tunesmith.config import ConvertConfig, ModelRef
from tunesmith.export.convert import export
from tunesmith.runs.tuned import TunedModel

base, adapter, output = map(Path, sys.argv[1:])
tuned = TunedModel("adapter", adapter, ModelRef(base))
export(tuned, ConvertConfig(max_shard_size="500KB"), output)
"""


# Ends itself by SIGKILL before its n-th change of the folder tree.
REPLACE = """
import os, signal, sys
from pathlib import Path
from tunesmith.atomic_files import replace_folder

left = int(sys.argv[2])

def count_down(event, arguments):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count_down)
with replace_folder(Path(sys.argv[1])) as folder:
    for name in ("config.json", "a", "b"):
        (folder / name).write_text("new")
"""


@pytest.fixture
def tuned(model_of: ModelOf, tmp_path: Path) -> TunedModel:
    return write_adapter(model_of("qwen3"), tmp_path / "adapter", target_modules=["q_proj"])


def unfinished(output: Path) -> list[Path]:
    return [*output.parent.glob(f".{output.name}_*"), *output.parent.glob(f".removed_{output.name}_*")]


def test_a_killed_conversion_leaves_no_folder_and_the_next_one_succeeds(tmp_path: Path) -> None:
    base = save_model(
        tmp_path / "base",
        build_tokenizer("byte_bpe"),
        "llama",
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
    )
    tuned = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    output = tmp_path / "out"
    words = [sys.executable, "-c", CONVERT, str(base), str(tuned.folder), str(output)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.parent.glob(f".{output.name}_*/model-00002*")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert unfinished(output), "it was killed half-way"

    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    assert load_weights(output).keys() == load_weights(base).keys()
    assert unfinished(output) == []


def read_texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_killed_at_any_moment_a_replacement_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    output = tmp_path / "out"
    old, new = (dict.fromkeys(("config.json", "a", "b"), text) for text in ("old", "new"))
    found = []
    for num_changes in range(20):
        output.mkdir()
        for name, text in old.items():
            (output / name).write_text(text)
        words = [sys.executable, "-c", REPLACE, str(output), str(num_changes)]
        code = subprocess.run(words, check=False).returncode
        assert code in (0, -signal.SIGKILL)
        set_aside = list(tmp_path.glob(".removed_out_*"))
        assert all(read_texts(folder) == old for folder in set_aside), "put back later, it must be whole"
        with pytest.raises(RunError, match="exists already"), new_folder(output, False, []):
            pass
        found.append(read_texts(output))
        assert unfinished(output) == []
        shutil.rmtree(output)
        if code == 0:
            break
    # Killed before the old one is set aside, before the new one takes its place, and at each change after that.
    assert found == [old, old, *[new] * (len(found) - 2)]
    assert len(found) > 6


def test_a_replacement_that_fails_keeps_the_old_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").touch()
    with pytest.raises(ExportError, match="broke off"), new_folder(output, True, []) as folder:
        shutil.rmtree(folder)
    assert unfinished(output) == []
    assert os.listdir(output) == ["config.json"]


def test_a_folder_that_exists_is_kept_unless_told_otherwise(tuned: TunedModel, tmp_path: Path) -> None:
    output = convert(tuned, tmp_path / "out")
    (output / "mark").touch()
    with pytest.raises(RunError, match="exists already") as error:
        convert(tuned, output)
    assert "--overwrite" in str(error.value.hint)
    assert (error.value.exit_code, (output / "mark").exists()) == (2, True)
    convert(tuned, output, overwrite=True, dtype="bfloat16")
    assert not (output / "mark").exists()
    assert {tensor.dtype for tensor in load_weights(output).values()} == {torch.bfloat16}


def test_a_failed_conversion_keeps_what_it_was_to_replace(
    tuned: TunedModel, model_of: ModelOf, tmp_path: Path
) -> None:
    output = convert(tuned, tmp_path / "out")
    before = load_weights(output)
    (tuned.folder / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        convert(tuned, output, overwrite=True)
    assert load_weights(output).keys() == before.keys()
    assert unfinished(output) == []


def test_only_a_model_is_overwritten_and_never_the_source(tuned: TunedModel, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").touch()
    with pytest.raises(RunError, match="holds something else than a model"):
        convert(tuned, tmp_path / "letters", overwrite=True)
    for source in (tuned.folder, tuned.folder.parent):
        with pytest.raises(RunError, match="holds what is to be exported"):
            convert(tuned, source, overwrite=True)
    assert (tuned.folder / "adapter_config.json").is_file()


def test_two_conversions_do_not_write_the_same_folder(tuned: TunedModel, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with new_folder(output, overwrite=False, sources=[]) as folder:
        (folder / "config.json").touch()
        with pytest.raises(RunError, match="another conversion is writing"):
            convert(tuned, output)
    assert (output / "config.json").exists()


def test_a_full_disk_is_told_before_anything_is_written(
    tuned: TunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 20))
    with pytest.raises(ResourceError, match=r"takes 6\d MiB, and .* has 1 MiB free") as error:
        convert(tuned, tmp_path / "out")
    assert error.value.exit_code == 2
    assert unfinished(tmp_path / "out") == []


def test_a_folder_that_cannot_be_written_is_told(tuned: TunedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="can't write beside") as error:
        convert(tuned, tmp_path / "file" / "out")
    assert error.value.exit_code == 1


def test_our_files_are_safetensors_of_any_types_and_shapes(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "turned": torch.randn(3, 5).T,
    }
    counted: list[int] = []
    write_tensors(tmp_path / "ours", tensors, reversed(tensors.items()), counted.append)
    assert sum(counted) == sum(tensor.nbytes for tensor in tensors.values())
    theirs, ours = load_file(tmp_path / "ours"), TensorFile(tmp_path / "ours")
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours.read(name), tensor)
        assert (ours.tensors[name].shape, ours.tensors[name].dtype) == (tensor.shape, tensor.dtype)
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b""])
def test_a_torn_file_is_an_error_that_names_it(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "torn"
    write_tensors(path, {"a": torch.ones(4)}, [("a", torch.ones(4))], lambda count: None)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match="torn` is not a whole safetensors file"):
        TensorFile(path)

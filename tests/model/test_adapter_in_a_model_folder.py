"""A folder with an adapter in it is never taken for a model: transformers would put the adapter on its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.exports import write_adapter
from support.runs import write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.cli import main
from tunesmith.config import EvaluateConfig
from tunesmith.runs.tuned import find_tuned


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`, an `adapter` on it, and `both` in one folder."""
    folder = tmp_path_factory.mktemp("adapter_in")
    plain = save_model(folder / "plain", build_tokenizer("byte_bpe"), "qwen3")
    write_adapter(plain, folder / "adapter", target_modules=["q_proj"])
    shutil.copytree(plain, folder / "both")
    for path in (folder / "adapter").glob("adapter_*"):
        shutil.copy(path, folder / "both")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.mark.parametrize("more", [[], ["--full_ft"]])
@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
@pytest.mark.parametrize("name", ["both", "adapter"])
def test_it_is_refused_as_the_model_to_train(
    name: str, verb: str, more: list[str], folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"--model_path={folders / name} --dataset_name={folders / 'rows.jsonl'} --home={tmp_path / 'home'}"
    )

    code = main([verb, *words.split(), "--input_template={question}", "--output_template={answer}", *more])

    printed = capsys.readouterr().err
    assert code == 2, printed
    assert "adapter_config.json" in printed and str(folders / name) in printed
    assert "hint: " in printed


@pytest.mark.parametrize("verb", ["evaluate", "convert"])
def test_it_is_refused_as_a_base_model(
    verb: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = f"--output_dir={tmp_path / 'out'}" if verb == "convert" else f"--test_dataset={folders}/rows.jsonl"

    code = main([verb, str(folders / "adapter"), f"--model_path={folders / 'both'}", last])

    printed = capsys.readouterr().err
    assert code == 2, printed
    assert "`adapter_config.json`: it can't be told which is meant" in printed


def test_as_a_tuned_model_it_is_the_adapter_on_its_own_base(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = find_tuned(EvaluateConfig(checkpoints_dir=str(folders / "both")))

    assert tuned.kind == "adapter"
    assert tuned.base is not None and tuned.base.folder == folders / "plain"
    assert "holds an adapter and a whole model" in caplog.text


@pytest.mark.parametrize("verb", ["evaluate", "convert"])
def test_what_is_left_of_an_adapter_beside_merged_weights_is_told(
    verb: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = shutil.copytree(folders / "both", tmp_path / "left")
    (left / "adapter_model.safetensors").unlink()

    assert main([verb, str(left), f"--home={tmp_path}"]) == 2

    printed = capsys.readouterr().err
    assert f"`{left}` holds a whole model" in printed
    assert "remove adapter_config.json" in printed.split("hint: ")[1]

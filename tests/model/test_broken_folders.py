"""A model folder with a fault in it is refused by every verb, in one error that names file and field."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.broken_folders import FAULTS, MORE_FAULTS, POINTER
from support.commands import run_python
from support.runs import write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.cli import main
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.load import (
    build_meta_model,
    check_weights,
    load_end_tokens,
    load_model,
    load_model_config,
    load_tokenizer,
)

_NEEDS = {"tokenizer.model alone": "sentencepiece", "ranks of tiktoken alone": "tiktoken"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "rows.jsonl")
    save_model(folder / "model", build_tokenizer("byte_bpe"))
    return folder


def _words(verb: str, model: Path, whole: Path, tmp_path: Path) -> list[str]:
    rows = whole / "rows.jsonl"
    if verb in ("train", "plan", "inspect"):
        templates = "--input_template={question} --output_template={answer} --max_seq_length=96 --num_proc=1"
        return [
            *(verb, f"--model_path={model}", f"--dataset_name={rows}", f"--home={tmp_path / 'home'}"),
            *templates.split(),
        ]
    more = [f"--output_dir={tmp_path / 'out'}"] if verb == "convert" else [f"--test_dataset={rows}"]
    return [verb, str(model), f"--home={tmp_path / 'home'}", *more]


def _look_at(ref: ModelRef) -> None:
    load_tokenizer(ref)
    build_meta_model(ref, load_model_config(ref))
    check_weights(ref)


@pytest.mark.parametrize("verb", ["train", "plan", "inspect", "evaluate", "convert"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_by_every_verb(
    fault: str, verb: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault in _NEEDS and importlib.util.find_spec(_NEEDS[fault]):
        pytest.skip(f"{_NEEDS[fault]} is installed")
    model = shutil.copytree(whole / "model", tmp_path / "model")
    FAULTS[fault].make(model)

    code = main(_words(verb, model, whole, tmp_path))

    printed = capsys.readouterr().err
    assert code == 2, printed
    assert printed.count("error: ") == printed.count("hint: ") == 1
    message = printed.split("error: ")[1]
    assert str(model) in message
    for name in FAULTS[fault].named:
        assert name in message
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", MORE_FAULTS)
def test_a_fault_is_told_where_the_model_is_looked_at(fault: str, whole: Path, tmp_path: Path) -> None:
    if fault in _NEEDS and importlib.util.find_spec(_NEEDS[fault]):
        pytest.skip(f"{_NEEDS[fault]} is installed")
    model = shutil.copytree(whole / "model", tmp_path / "model")
    MORE_FAULTS[fault].make(model)

    with pytest.raises(ModelError) as raised:
        _look_at(ModelRef(model))

    for name in MORE_FAULTS[fault].named:
        assert name in str(raised.value)
    assert raised.value.hint


def test_the_field_is_named_in_the_config_it_is_nested_in(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    Gemma3Config(
        text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 1}
    ).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["rms_norm_eps"] = "1e-6"
    (tmp_path / "config.json").write_text(json.dumps(content))

    with pytest.raises(ModelError, match=r"config.json`: `text_config.rms_norm_eps` is"):
        load_model_config(ModelRef(tmp_path))


def test_settings_of_sampling_that_greedy_answers_leave_alone_do_no_harm(whole: Path, tmp_path: Path) -> None:
    model = shutil.copytree(whole / "model", tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.9, "eos_token_id": [0, 3]}))
    ref = ModelRef(model)

    load_model(ref, torch.device("cpu"), torch.float32)

    assert load_end_tokens(ref, load_model_config(ref)) == {0, 3}


def test_pointers_that_transformers_leaves_alone_do_no_harm(whole: Path, tmp_path: Path) -> None:
    model = shutil.copytree(whole / "model", tmp_path / "model")
    for name in ("flax_model.msgpack", "pytorch_model.bin", "model.safetensors.index.json", "README.md"):
        (model / name).write_text(POINTER)

    check_weights(ModelRef(model))


LOOK_AT_HUB = """
import json
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.load import check_weights, load_model_config, load_tokenizer
told = {}
for name in ("adapter", "answers", "typed", "vocabulary"):
    ref = ModelRef(f"org/{name}")
    try:
        check_weights(ref)
        load_model_config(ref)
        load_tokenizer(ref)
    except ModelError as error:
        told[name] = error.message
print(json.dumps(told))
"""


def test_faults_of_models_of_the_hub_are_told_too(whole: Path, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Path], object]] = {
        "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "answers": FAULTS["several answers where one is made"].make,
        "typed": FAULTS["text in place of a number"].make,
        "vocabulary": FAULTS["tokenizer.model alone"].make,
    }
    for name, change in changes.items():
        cache = tmp_path / f"hub/models--org--{name}"
        change(shutil.copytree(whole / "model", cache / "snapshots" / ("1" * 40)))
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text("1" * 40)

    told = run_python(LOOK_AT_HUB, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    assert "`org/adapter` holds a model and an adapter" in told["adapter"]
    assert "`num_return_sequences`" in told["answers"]
    assert "config.json of org/typed" in told["typed"] and "rms_norm_eps" in told["typed"]
    if not importlib.util.find_spec("sentencepiece"):
        assert "the package `sentencepiece`" in told["vocabulary"]

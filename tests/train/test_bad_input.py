"""Bad input ends with one clear error and a hint, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from support.runs import small_config, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    save_model(folder / "tiny", build_tokenizer("byte_bpe"))
    write_rows(folder / "rows.jsonl")
    (folder / "empty.jsonl").touch()
    (folder / "malformed.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a", \n')
    (folder / "latin.jsonl").write_bytes('{"question": "é", "answer": "b"}\n'.encode("latin-1"))
    (folder / "silent.jsonl").write_text('{"question": "a", "answer": ""}\n' * 4)
    (folder / "file").touch()
    for name, kept in (("torn", 2000), ("weightless", 0)):
        save_model(folder / name, build_tokenizer("byte_bpe"))
        weights = folder / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept])
    (folder / "weightless/model.safetensors").unlink()
    tokenizer = build_tokenizer("byte_bpe")
    save_model(folder / "endless", tokenizer)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "endless" / name
        if path.exists():
            path.write_text("{}")
    return folder


CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    # what is wrong: (settings, part of the error, part of the hint)
    "unknown model path": (
        {"model_path": "{folder}/nowhere"},
        "which is not a folder",
        "name a model of the hub",
    ),
    "a folder that is no model": (
        {"model_path": "{folder}"},
        "holds no config.json",
        "Hugging Face model folder",
    ),
    "a model without weights": ({"model_path": "{folder}/weightless"}, "holds no weights", "download"),
    "torn weights": (
        {"model_path": "{folder}/torn"},
        "torn/model.safetensors` is not a whole",
        "download it again",
    ),
    "unknown hub model": (
        {"model_path": "none", "hf_model_id": "nobody/nothing"},
        "`nobody/nothing`",
        "HF_TOKEN",
    ),
    "unknown data file": ({"dataset_name": "{folder}/nowhere.jsonl"}, "nowhere.jsonl", ""),
    "unknown hub data set": ({"dataset_name": "nobody/nothing"}, "nobody/nothing", ""),
    "empty file": ({"dataset_name": "{folder}/empty.jsonl"}, "empty.jsonl", ""),
    "malformed row": ({"dataset_name": "{folder}/malformed.jsonl"}, "line 2", ""),
    "wrong encoding": ({"dataset_name": "{folder}/latin.jsonl"}, "UTF-8", ""),
    "missing column": (
        {"field_mapping": "instruction=questoin,output=answer"},
        "`questoin`",
        "`question`, `answer`",
    ),
    "unknown placeholder": ({"input_template": "{{nothing}}"}, "nothing", ""),
    "malformed template": ({"input_template": "{{question"}, "input_template", ""),
    "ratio out of range": ({"train_split_ratio": "1.5"}, "train_split_ratio", ""),
    "no trainable token": ({"dataset_name": "{folder}/silent.jsonl"}, "no token", ""),
    "target that matches nothing": ({"lora_target_modules": "q_porj"}, "`q_porj`", "`q_proj`"),
    "more workers than there are": ({"num_workers": "64"}, "`num_workers` is 64", "at most"),
    "GPUs where there are none": ({"use_gpu": "true"}, "no GPU", "use_gpu"),
    "GPU attention on CPUs": ({"attn_implementation": "flex_attention"}, "trains on GPUs alone", "`sdpa`"),
    "home that can't be written": ({"home": "{folder}/file/home"}, "can't be written", "--home"),
    "tokenizer without an end token": ({"model_path": "{folder}/endless"}, "no end token", "eos_token"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_a_hint(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "GPUs where there are none" and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    changes, error, hint = CASES[case]
    home = tmp_path / "home"
    config = small_config(folder / "tiny", folder / "rows.jsonl", home)
    settings = config.model_dump(mode="json", exclude_unset=True)
    settings["field_mapping"] = "instruction=question,output=answer"
    settings |= {name: str(value).format(folder=folder) for name, value in changes.items()}
    before = sorted(folder.rglob("*"))

    code = main(["train", *(f"--{name}={value}" for name, value in settings.items())])

    printed = capsys.readouterr().err
    assert code == 2, printed
    assert printed.count("error: ") == 1
    assert error in printed
    assert "hint: " in printed
    assert hint in printed.split("hint: ")[1]
    assert "Traceback" not in printed
    assert not [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"], "half-written"
    assert sorted(folder.rglob("*")) == before

"""What goes out stops: generation_config.json names the end tokens that training taught."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from support.exports import convert, tuned_of, write_adapter
from support.runs import copy_run, small_config, start, train_here
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ConvertConfig, TrainConfig
from tunesmith.export.final import write_final
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import find_tuned

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

GENERATION = "generation_config.json"
END_OF_TEXT, IM_END = 0, 2
SAMPLING = '{\n    "temperature": 0.60,\n    "eos_token_id": 0,\n  "do_sample": true\n}'


def ends_of(folder: Path) -> Any:
    return json.loads((folder / GENERATION).read_text())["eos_token_id"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: its tokenizer has a chat template, and ends texts, not turns."""
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer("chatml")))
    tokenizer.eos_token = "<|endoftext|>"
    folder = save_model(tmp_path_factory.mktemp("models") / "base", tokenizer)
    (folder / GENERATION).write_text(SAMPLING)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes"}]
        for number in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory, alone: None) -> RunDir:
    changes = {"max_steps": 16, "learning_rate": 3e-2, "lora_rank": 8, "eval_steps": 0, "save_steps": 0}
    config = small_config(base, chats, tmp_path_factory.mktemp("run"), **changes)
    given = config.model_fields_set - {"field_mapping", "input_template", "output_template"}
    run = train_here(start(TrainConfig(**{name: getattr(config, name) for name in given})))
    tuned = tuned_of(run)
    assert tuned.base is not None
    write_final(run, tuned.base)
    return run


def test_the_export_of_a_base_model_tuned_on_chats_stops(run: RunDir, tmp_path: Path) -> None:
    merged = convert(tuned_of(run), tmp_path / "out")
    assert ends_of(merged) == [IM_END, END_OF_TEXT]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "99?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    whole = AutoModelForCausalLM.from_pretrained(merged)
    adapted = AutoPeftModelForCausalLM.from_pretrained(run.final_path)
    adapted.generation_config = GenerationConfig.from_pretrained(run.final_path)
    for model in (whole, adapted):
        answer = model.generate(**prompt, do_sample=False, max_new_tokens=40)[
            0, prompt["input_ids"].shape[1] :
        ]
        assert answer[-1] == IM_END, tokenizer.decode(answer)
        assert len(answer) < 40


@pytest.mark.parametrize("no_merge", [False, True])
def test_only_the_end_tokens_change_in_the_file(no_merge: bool, run: RunDir, tmp_path: Path) -> None:
    folder = convert(tuned_of(run), tmp_path / "out", no_merge=no_merge)
    expected = SAMPLING.replace('"eos_token_id": 0', '"eos_token_id": [2, 0]')
    assert (folder / GENERATION).read_text() == expected
    assert (run.final_path / GENERATION).read_text() == expected


@pytest.mark.parametrize("way", ["not recorded", "moved", "gone", "copied away"])
def test_runs_that_recorded_no_ends_are_asked_for_their_tokens(
    way: str, run: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = copy_run(run, tmp_path / "home")
    params = copy.read_params()
    assert params["data"]["end_tokens"] == [IM_END]
    tuned = tuned_of(copy)
    if way != "copied away":
        del params["data"]["end_tokens"]
        if way != "not recorded":
            params["data"] |= {"folder": f"/elsewhere/{Path(params['data']['folder']).name}"}
            params["data"] |= {"data_dir": f"/elsewhere/{Path(params['data']['data_dir']).name}"}
        copy.write_params(params)
        if way == "gone":
            shutil.rmtree(copy.datasets_path)
        tuned = tuned_of(copy)
    else:
        shutil.copytree(tuned.folder, tmp_path / "alone")
        shutil.rmtree(copy.home)
        tuned = find_tuned(ConvertConfig(checkpoints_dir=str(tmp_path / "alone")))
    with caplog.at_level(logging.WARNING, "tunesmith"):
        folder = convert(tuned, tmp_path / "out")
    assert ends_of(folder) == (END_OF_TEXT if way == "gone" else [IM_END, END_OF_TEXT])
    assert ("didn't record which tokens end" in caplog.text) == (way == "gone")


def test_an_export_and_final_are_exported_again_with_their_ends(run: RunDir, tmp_path: Path) -> None:
    alone = shutil.copytree(run.final_path, tmp_path / "alone")
    (alone / "tunesmith.json").unlink()
    for number, folder in enumerate((alone, convert(tuned_of(run), tmp_path / "first"))):
        tuned = find_tuned(ConvertConfig(checkpoints_dir=str(folder)))
        assert ends_of(convert(tuned, tmp_path / str(number))) == [IM_END, END_OF_TEXT]


def test_an_adapter_of_others_brings_its_tokenizer_s_end(base: Path, tmp_path: Path) -> None:
    tuned = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert (convert(tuned, tmp_path / "without") / GENERATION).read_text() == SAMPLING
    build_tokenizer("chatml").save_pretrained(tuned.folder)
    assert ends_of(convert(tuned, tmp_path / "with")) == [IM_END, END_OF_TEXT]


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ('{"eos_token_id": [0, 2], "top_k": 20}', '{"eos_token_id": [0, 2], "top_k": 20}'),
        ('{"top_k": 20}', '{"top_k": 20,"eos_token_id": [2, 0]}'),
        ("{}", '{\n  "eos_token_id": [2, 0]\n}'),
        ('{"do_sample": false, "temperature": 0.9, "eos_token_id": null}', '{"do_sample": false, "temperature": 0.9, "eos_token_id": [2, 0]}'),
    ],
)  # fmt: skip
def test_a_published_file_gets_what_it_lacks_and_no_more(
    published: str, expected: str, base: Path, run: RunDir, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    (other / GENERATION).write_text(published)
    tuned = find_tuned(ConvertConfig(checkpoints_dir=str(run.path), model_path=other))
    assert (convert(tuned, tmp_path / "out") / GENERATION).read_text() == expected


def test_a_model_without_the_file_gets_one_that_stops(base: Path, run: RunDir, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    (other / GENERATION).unlink()
    tuned = find_tuned(ConvertConfig(checkpoints_dir=str(run.path), model_path=other))
    folder = convert(tuned, tmp_path / "out")
    assert ends_of(folder) == [IM_END, END_OF_TEXT]
    assert "_from_model_config" not in json.loads((folder / GENERATION).read_text())
    torch.manual_seed(0)
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [
        IM_END,
        END_OF_TEXT,
    ]

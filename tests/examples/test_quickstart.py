"""The quickstart's pieces: its data set, its model folder, its config."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from tunesmith.config import TrainConfig
from tunesmith.config.layers import load_settings

QUICKSTART = REPOSITORY / "examples" / "quickstart"


def build_dataset(path: Path, hash_seed: str) -> list[dict[str, str]]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, str(QUICKSTART / "build_dataset.py"), str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return build_dataset(tmp_path_factory.mktemp("data") / "questions.jsonl", hash_seed="1")


def test_data_set_holds_several_thousand_rows_of_question_and_answer(rows):
    assert len(rows) > 5000
    assert all(set(row) == {"question", "answer"} for row in rows)
    assert all(20 <= len(row["answer"]) <= 400 for row in rows)
    assert all("`" in row["question"] and row["question"][-1] in "?." for row in rows)


def test_no_question_and_no_answer_comes_twice(rows):
    assert len({row["question"] for row in rows}) == len(rows)
    assert len({row["answer"] for row in rows}) == len(rows)


def test_data_set_is_the_same_whatever_the_hash_seed(rows, tmp_path):
    assert build_dataset(tmp_path / "questions.jsonl", hash_seed="2") == rows


def test_data_set_tells_nothing_of_the_machine(rows):
    text = json.dumps(rows)
    assert not any(str(path) in text for path in (sys.prefix, sys.base_prefix, Path.home(), REPOSITORY))
    assert " at 0x" not in text


def test_a_known_function_is_described_and_called_right(rows):
    answers = {row["answer"] for row in rows if "`textwrap.shorten`" in row["question"]}
    assert answers == {
        "Collapse and truncate the given text to fit in the given width.",
        "`textwrap.shorten(text, width, **kwargs)`",
    }


def test_an_unchanged_data_set_is_not_written_again(tmp_path):
    path = tmp_path / "questions.jsonl"
    build_dataset(path, hash_seed="1")
    before = path.stat().st_mtime_ns
    build_dataset(path, hash_seed="1")
    assert path.stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def quickstart_model() -> Path:
    """The folder that `make model` makes; it is made here if need be."""
    folder = QUICKSTART / "build" / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, str(QUICKSTART / "fetch_model.py")], check=True)
    return folder


@pytest.mark.slow
def test_model_folder_holds_the_weights_and_answers_of_the_gguf_file(quickstart_model, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.syspath_prepend(QUICKSTART)
    from fetch_model import download_gguf

    gguf_path = download_gguf(tmp_path)
    source = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf_path.name, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(quickstart_model)
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)

    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = model.state_dict()
    assert weights.keys() == source.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in source.state_dict().items())

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answers = [
        tokenizer.decode(
            each.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        )
        for each in (model, source)
    ]
    assert answers[0] == answers[1]
    assert "Paris" in answers[0]
    assert answers[0].endswith("<|im_end|>")


@pytest.mark.slow
def test_model_folder_has_a_tokenizer_with_whole_special_tokens(quickstart_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    assert tokenizer.eos_token == "<|im_end|>"
    for token in tokenizer.all_special_tokens:
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    text = "<|im_start|>user\n  Wörter, 日本語 and\n\tdef f(x): return x**2024<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template is not None


def test_run_file_and_readme_config_are_accepted(tmp_path):
    config = load_settings(TrainConfig, QUICKSTART / "run.yaml", {}, {})
    assert REPOSITORY / config.dataset_name == QUICKSTART / "build" / "python_questions.jsonl"
    assert config.input_template.count("\n") == 3

    [block] = re.findall(
        r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
    assert load_settings(TrainConfig, tmp_path / "run.yaml", {}, {}).max_steps == 1000

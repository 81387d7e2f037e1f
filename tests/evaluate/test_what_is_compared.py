"""Whole evaluations of tiny models: copies, rows that were trained on, cut, empty and unended answers, what is left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from support.data_sets import write_rows as write_lines
from support.runs import copy_run, small_config, start, train_here, write_rows
from support.tiny_models import save_model
from support.tokenizers import CHATML_TEMPLATE, build_tokenizer
from tunesmith.api import evaluate
from tunesmith.config import EvaluateConfig
from tunesmith.errors import ConfigError, DataError, ModelError
from tunesmith.evaluate.engines.base import Generation
from tunesmith.evaluate.evaluation import EvaluationResult
from tunesmith.evaluate.plan import evaluation_folder, make_plan
from tunesmith.evaluate.results import Prediction
from tunesmith.evaluate.store import GenerationStore
from tunesmith.evaluate.table import format_scores
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import find_tuned

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

ModelOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory, alone: None) -> RunDir:
    folder = tmp_path_factory.mktemp("trained")
    rows = write_rows(folder / "rows.jsonl", num_rows=40)
    config = small_config(model_of("llama"), rows, folder / "home", max_steps=2, train_split_ratio=0.7)
    return train_here(start(config))


@pytest.fixture
def run(trained: RunDir, tmp_path: Path) -> RunDir:
    return copy_run(trained, tmp_path / "home")


def settings(where: Path, **changes: Any) -> EvaluateConfig:
    fixed: dict[str, Any] = {"engine": "transformers", "max_tokens": 4, "metrics": ["chrf"]}
    return EvaluateConfig(**{**fixed, "checkpoints_dir": str(where), **changes})


def done(result: EvaluationResult) -> tuple[str, str, list[Prediction]]:
    """Return what the terminal says, the page, and the predictions."""
    console = Console(width=200, record=True, quiet=False, file=(result.folder / "out").open("w"))
    console.print(format_scores(result.scores))
    lines = (result.folder / "predictions.jsonl").read_text().splitlines()
    page = (result.folder / "report.html").read_text()
    return " ".join(console.export_text().split()), page, [json.loads(line) for line in lines]


def test_copies_count_as_one_sample_and_are_told(run: RunDir, tmp_path: Path) -> None:
    three = [{"question": f"new {i}?", "answer": str(i)} for i in range(3)]
    near = [{"question": f" New  {i}?", "answer": f"{i}, or so"} for i in range(3)]
    result = evaluate(
        settings(run.path, test_dataset=write_lines(tmp_path / "copied.jsonl", three * 19 + near))
    )
    said, page, rows = done(result)
    scores = result.scores
    assert (scores["num_samples"], scores["num_different"]) == (60, 3)
    assert scores["metrics"]["chrf"]["num_different"] == 3
    assert [row["group"] for row in rows] == [0, 1, 2] * 20
    assert scores["verdict"]["outcome"] == "unclear"
    assert "60 samples (3 different) are too few to tell" in said
    assert "60, 3 different" in said and "60, 3 different" in page
    once = evaluate(settings(run.path, test_dataset=write_lines(tmp_path / "once.jsonl", three)))
    assert once.scores["num_different"] == once.scores["num_samples"] == 3
    assert "different" not in done(once)[0]


def test_rows_that_were_trained_on_are_named_in_the_verdict_and_by_their_sample(
    run: RunDir, tmp_path: Path
) -> None:
    prepared = Path(run.read_params()["data"]["data_dir"])
    training = [json.loads(line) for line in (prepared / "training.jsonl").read_text().splitlines()]
    as_raw = [{"question": row["input"].removesuffix(" "), "answer": row["output"]} for row in training]
    test = [
        *as_raw[:3],
        {**as_raw[3], "question": as_raw[3]["question"].upper() + " "},
        {**as_raw[4], "answer": "another answer"},
        {"question": "nowhere seen?", "answer": "no"},
    ]
    result = evaluate(settings(run.path, test_dataset=write_lines(tmp_path / "held.jsonl", test)))
    said, page, rows = done(result)
    assert [row["trained"] for row in rows] == ["row", "row", "row", "row", "prompt", None]
    assert result.scores["trained_on"] == {"rows": 4, "prompts": 1}
    told = "4 of the 6 samples were trained on, and the prompt of 1 more was trained on with another answer"
    assert told in said and told in page and told in result.scores["verdict"]["text"]
    own = evaluate(settings(run.path, max_samples=2))
    assert "2, of the first 2 rows (--max_samples)" in done(own)[0]
    assert own.scores["trained_on"] == {"rows": 0, "prompts": 0}
    assert "trained on" not in done(own)[0]


def test_answers_that_were_cut_off_or_are_empty_are_told_beside_the_mean(run: RunDir) -> None:
    result = evaluate(settings(run.path, max_tokens=2))
    said, page, rows = done(result)
    for variant in ("tuned", "base"):
        endings = result.scores["endings"][variant]  # type: ignore[index]
        assert endings["answers"] == len(rows)
        key = "finish_reason" if variant == "tuned" else "base_finish_reason"
        assert endings["cut"] == sum(row[key] == "length" for row in rows) > 0  # type: ignore[literal-required]
        text = f"{endings['cut']} of {len(rows)} answers never ended: cut off at 2 tokens"
        assert text in said and text in page


CHAT_ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} and 1?"},
            {"role": "assistant", "content": f"<think>\n{i} plus one.\n</think>\n\n{i + 1}"},
        ]
    }
    for i in range(7)
]


def test_reasoning_is_kept_and_shown_and_not_compared(tmp_path: Path) -> None:
    """A row whose answer a model gave is right, whatever either of them has reasoned before."""
    model = save_model(tmp_path / "model", build_tokenizer("qwen3"))
    rows = write_lines(tmp_path / "chats.jsonl", CHAT_ROWS)
    config = settings(model, test_dataset=rows, home=tmp_path, max_tokens=64)
    config = config.model_copy(update={"metrics": ["exact_match", "numeric_match"]})
    said = "<think>\nLong, and otherwise.\n</think>\n\n1"
    result = evaluate_answers(config, [said, "<think>\n\n</think>\n\n2", "3", "<think>\nnever", "", "9", "7"])
    text, page, predictions = done(result)
    assert [row["reference"] for row in predictions] == [str(i + 1) for i in range(7)]
    assert predictions[0]["reference_reasoning"] == "0 plus one."
    assert [row["prediction"] for row in predictions] == ["1", "2", "3", "", "", "9", "7"]
    assert predictions[0]["reasoning"] == "Long, and otherwise." and predictions[1]["reasoning"] == ""
    assert [row["scores"]["exact_match"] for row in predictions] == [1, 1, 1, 0, 0, 0, 1]
    assert result.scores["endings"]["tuned"] == {
        "answers": 7,
        "cut": 1,
        "cut_early": 1,
        "unended": 1,
        "empty": 1,
        "num_whole": 5,
        "whole": {"exact_match": 0.8, "numeric_match": 0.8},
    }
    assert "7; no training set is known to compare them with" in text
    assert "1 of 7 answers never left their reasoning" in text and "1 of 7 answers are empty" in text
    assert "numeric match 80.0 % over the 5 others, 57.1 % over all" in text
    assert "Long, and otherwise." in page and '<details class="long thoughts">' in page


def evaluate_answers(config: EvaluateConfig, said: list[str]) -> EvaluationResult:
    """Evaluate answers that were generated before, as one that was cut short would have kept them."""
    tuned = find_tuned(config)
    plan = make_plan(config, tuned, use_gpu=False)
    tokenizer = AutoTokenizer.from_pretrained(tuned.folder)
    prompts = {number: prompt.input_ids for number, prompt in plan.test_set.samples.items()}
    folder = evaluation_folder(config, tuned)
    folder.mkdir(parents=True)
    store = GenerationStore(folder, plan.identity(config), prompts)
    generations = [
        Generation(
            number,
            "tuned",
            tuple(tokenizer(text, add_special_tokens=False).input_ids),
            "length" if text.endswith("never") else "stop",
        )
        for number, text in zip(prompts, said, strict=True)
    ]
    assert len(list(store.record([generations]))) == 1
    return evaluate(config)


CALLS_TEMPLATE = CHATML_TEMPLATE.replace(
    "message['content'] +",
    "message['content'] + (['<tool_call>\\n{\"name\": \"' + message.tool_calls[0].function.name + '\", \"arguments\": ' + "
    "(message.tool_calls[0].function.arguments | tojson) + '}\\n</tool_call>'] if message.tool_calls else [''])[0] +",
)


def test_calls_are_compared_by_name_and_arguments_and_decide(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", build_tokenizer("chatml"))
    (tmp_path / "calls.jinja").write_text(CALLS_TEMPLATE)

    def row(i: int) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": i, "b": 1}}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": f"{i} and 1?"}, answer]}

    config = settings(
        model,
        test_dataset=write_lines(tmp_path / "calls.jsonl", [row(i) for i in range(3)]),
        home=tmp_path,
        metrics=None,
        chat_template=str(tmp_path / "calls.jinja"),
    )
    said = [
        '<tool_call>\n{"arguments": {"b": 1, "a": 0}, "name": "add"}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 1}}\n</tool_call>',
        "It is 3.",
    ]
    result = evaluate_answers(config, said)
    _, _, predictions = done(result)
    assert [row["scores"]["tool_calls"] for row in predictions] == [1, 0, 0]
    assert predictions[0]["scores"]["exact_match"] == 0, "as text they differ"
    assert result.scores["verdict"]["metric"] == "tool_calls"


def test_calls_in_a_form_that_isnt_known_are_told(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", build_tokenizer("chatml"))
    (tmp_path / "calls.jinja").write_text(
        CHATML_TEMPLATE.replace(
            "message['content'] +",
            "message['content'] + ('use ' + message.tool_calls[0].function.name + ' with ' + "
            "(message.tool_calls[0].function.arguments | tojson) if message.tool_calls else '') +",
        )
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "tool_calls": [call]}]}
    config = settings(
        model,
        test_dataset=write_lines(tmp_path / "calls.jsonl", [row]),
        home=tmp_path,
        metrics=None,
        chat_template=str(tmp_path / "calls.jinja"),
    )
    result = evaluate_answers(config, ['use add with {"a": 1}'])
    assert "in a form that isn't known" in result.scores["left_out"]["tool_calls"]
    assert result.scores["metrics"]["exact_match"]["tuned"]["mean"] == 1


def test_metrics_are_chosen_by_the_samples_that_are_asked(run: RunDir, tmp_path: Path) -> None:
    """The one reference with a number is left out for its prompt's length."""
    rows = [
        {"question": "long " * 40 + "?", "answer": "#### 72"},
        *({"question": f"{i}?", "answer": "a word"} for i in range(3)),
        {"question": "unanswered?", "answer": ""},
    ]
    config = settings(run.path, test_dataset=write_lines(tmp_path / "rows.jsonl", rows), max_model_len=40)
    result = evaluate(config.model_copy(update={"metrics": None}))
    assert "numeric_match" not in result.scores["metrics"]
    assert "tool_calls" not in result.scores["left_out"]
    assert result.scores["rows_left_out"] == {
        "no answer to compare with": 1,
        "a prompt that fills max_model_len": 1,
    }
    said, page, _ = done(result)
    told = "2 rows: 1 with no answer to compare with, 1 with a prompt that fills max_model_len"
    assert told in said and told in page
    with pytest.raises(ConfigError, match="no reference comes to one"):
        evaluate(config.model_copy(update={"metrics": ["numeric_match"]}))


def test_rows_of_ones_own_are_read_for_a_model_that_no_run_recorded(
    model_of: ModelOf, tmp_path: Path
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"question": f"{i}?", "answer": f"a {i}"} for i in range(3)])
    config = settings(model_of("llama"), test_dataset=rows, home=tmp_path)
    with pytest.raises(DataError) as caught:
        evaluate(config)
    assert {"input_template", "output_template", "field_mapping"} <= set(EvaluateConfig.model_fields)
    assert "set input_template and output_template" in str(caught.value.hint)

    def asked(**given: Any) -> list[tuple[str, str]]:
        plan = make_plan(config.model_copy(update=given), find_tuned(config), use_gpu=False)
        return [(prompt.text, prompt.reference) for prompt in plan.test_set.samples.values()]

    given = {"input_template": "Q: {question}\n", "output_template": "A: {answer}"}
    assert asked(**given)[0] == ("Q: 0?\nA:", "a 0") or asked(**given)[0] == ("Q: 0?\nA: ", "a 0")
    mapped = asked(field_mapping={"instruction": "question", "output": "answer"})
    assert "0?" in mapped[0][0] and mapped[0][1] == "a 0"


def test_conversations_are_read_for_a_model_without_a_chat_template(
    model_of: ModelOf, tmp_path: Path
) -> None:
    talk = [{"speaker": "human", "text": "Hi"}, {"speaker": "bot", "text": "Hello"}]
    rows = write_lines(tmp_path / "rows.jsonl", [{"dialogue": talk}])
    given: dict[str, Any] = {
        "test_dataset": rows,
        "field_mapping": {"messages": "dialogue"},
        "message_keys": {"role": "speaker", "content": "text"},
        "role_names": {"assistant": "bot"},
    }
    config = settings(model_of("llama"), home=tmp_path, **given)
    with pytest.raises(DataError) as caught:
        make_plan(config, find_tuned(config), use_gpu=False)
    assert "--chat_template" in str(caught.value.hint)
    (tmp_path / "chat.jinja").write_text(CHATML_TEMPLATE)
    config = config.model_copy(update={"chat_template": str(tmp_path / "chat.jinja")})
    (prompt,) = make_plan(config, find_tuned(config), use_gpu=False).test_set.samples.values()
    assert prompt.text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.reference == "Hello"


def test_scores_of_other_rules_are_told_and_redone(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = evaluate(settings(run.path))
    assert "other rules" not in caplog.text
    older = {key: value for key, value in first.scores.items() if key not in ("rules", "endings")}
    (first.folder / "scores.json").write_text(json.dumps(older))
    again = evaluate(settings(run.path))
    assert "compared answers by other rules (1, now 2)" in caplog.text
    assert "answers are kept from an earlier evaluation" in caplog.text, (
        "what was generated is as good as ever"
    )
    assert again.scores == first.scores


def test_a_generation_config_that_no_answer_can_be_made_with_is_refused(tmp_path: Path) -> None:
    """transformers doesn't load such a model, nor what would be exported of it."""
    model = save_model(tmp_path / "model", build_tokenizer("byte_bpe"))
    path = model / "generation_config.json"
    path.write_text('{"num_return_sequences": 2, "eos_token_id": [0, 7]}')
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": "1?", "completion": "2"}])
    config = settings(model, test_dataset=rows, home=tmp_path)
    with pytest.raises(ModelError, match="num_return_sequences"):
        make_plan(config, find_tuned(config), use_gpu=False)
    path.write_text('{"do_sample": false, "temperature": 0.9, "eos_token_id": [0, 7]}')
    assert make_plan(config, find_tuned(config), use_gpu=False).stop_token_ids == (0, 7)
    assert evaluate(config).scores["num_samples"] == 1

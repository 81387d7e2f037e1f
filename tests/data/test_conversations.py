"""Conversations in the forms that people have: what is trained is what their owner meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from support.conversations import (
    ASSISTANT,
    DATE,
    GREETING,
    USER,
    call,
    encode,
    say,
    settings_of,
    tool,
)
from support.labels import spell, with_template
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.formats import Findings, RenderedRow, RowFormat, choose_format
from tunesmith.data.sources import read_rows
from tunesmith.errors import ConfigError, DataError

TOOLS_TEMPLATE = """{%- if tools %}{{- 'TOOLS ' + (tools | tojson) + '\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{- '<call>{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + '}</call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def read(row: dict[str, Any]) -> tuple[RowFormat, RenderedRow]:
    chosen = choose_format(TrainConfig(dataset_name="rows.jsonl"), row, "`rows.jsonl` (train)")
    return chosen, chosen.render(row, "line 1")


def spelled(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None) -> list[str]:
    tokenizer = tokenizer or build_tokenizer("chatml")
    chosen, rendered = read(row)
    (examples,) = chosen.with_tokenizer(tokenizer, DATE).encode([rendered], Findings())
    return [spell(tokenizer, segment) for example in examples for segment in example.segments]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello")]},
        {"messages": [say("human", "Hi"), say("gpt", "Hello")]},
        {"messages": [say(USER, [{"type": "text", "text": "Hi"}]), say(ASSISTANT, [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}])]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [say(USER, "Hi"), say(ASSISTANT, "Hello")]},
        {"prompt": [say(USER, "Hi")], "completion": [say(ASSISTANT, "Hello")]},
    ],
    ids=["messages", "other roles", "parts", "sharegpt", "conversations", "prompt and completion"],
)  # fmt: skip
def test_one_conversation_in_its_forms(row: dict[str, Any]) -> None:
    assert spelled(row) == [GREETING]


def test_a_prompt_and_a_completion_of_text_are_one_text() -> None:
    row = {"prompt": "The sky is", "completion": " blue"}
    assert spelled(row) == ["The sky is⟦ blue<|im_end|>⟧"]


def test_of_a_prompt_of_messages_nothing_is_trained() -> None:
    prompt = [say(USER, "Hi"), say(ASSISTANT, "Yes?"), say(USER, "Bye")]
    (text,) = spelled({"prompt": prompt, "completion": [say(ASSISTANT, "So long")]})
    assert text.count("⟦") == 1
    assert text.endswith("⟦So long<|im_end|>⟧")


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss"])
def test_a_message_says_whether_it_is_trained(key: str) -> None:
    no, yes = (0, 1) if key == "weight" else (False, True)
    row = {"messages": [say(USER, "2+2?"), say(ASSISTANT, "5", **{key: no}), say(USER, "Sure?"), say(ASSISTANT, "No, 4", **{key: yes})]}  # fmt: skip
    (text,) = spelled(row)
    assert text.count("⟦") == 1
    assert text.endswith("⟦No, 4<|im_end|>⟧")
    row["messages"][0][key] = yes
    (text,) = spelled(row)
    assert text.startswith("<|im_start|>user\n⟦2+2?<|im_end|>⟧\n")
    del row["messages"][0][key], row["messages"][3][key]
    assert spelled(row)[0].count("⟦") == 1
    row["messages"][3][key] = no
    assert spelled(row) == []


@pytest.mark.parametrize("marks", [{"weight": 0.5}, {"weight": 0, "train": True}, {"train": "no"}])
def test_a_message_that_is_half_trained_is_refused(marks: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="message 2 of line 1"):
        read({"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello", **marks)]})


@pytest.mark.parametrize("as_text", [False, True])
def test_a_call_is_trained_as_an_object_and_is_what_is_expected(as_text: bool) -> None:
    arguments: Any = json.dumps({"city": "Ulm"}) if as_text else {"city": "Ulm"}
    calls: Any = [call(arguments)]
    row = {
        "messages": [
            say(USER, "Weather?"),
            say(ASSISTANT, None, tool_calls=json.dumps(calls) if as_text else calls),
        ]
    }
    tokenizer = with_template(TOOLS_TEMPLATE)
    expected = '<call>{"name": "weather", "arguments": {"city": "Ulm"}}</call>'
    assert spelled(row, tokenizer)[0].endswith(f"⟦{expected}<|im_end|>⟧")
    chosen, rendered = read(row)
    prompt = chosen.with_tokenizer(tokenizer, DATE).prompt(rendered)
    assert prompt is not None
    assert prompt.reference == expected
    with pytest.raises(DataError, match="leaves out a tool call"):
        spelled(row)


def test_sharegpts_calls_and_system_become_a_conversation() -> None:
    value = json.dumps({"name": "weather", "arguments": {"city": "Ulm"}})
    turns = [("human", "Weather?"), ("function_call", value), ("observation", "Rain"), ("gpt", "It rains")]
    row: dict[str, Any] = {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "system": "Be brief.",
        "tools": json.dumps([tool("weather", city="string")]),
    }
    (text,) = spelled(row, with_template(TOOLS_TEMPLATE))
    assert text.startswith("TOOLS [{")
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user" in text
    assert "<|im_start|>tool\nRain<|im_end|>" in text
    assert text.count("⟦") == 2
    assert text.endswith("⟦It rains<|im_end|>⟧")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (say(USER, [{"type": "image_url", "image_url": {"url": "x"}}]), "part of type `image_url`"),
        (say(ASSISTANT, "", tool_calls=[call("{city}")]), "`arguments` of a call"),
        (say(ASSISTANT, "", tool_calls="weather()"), "`tool_calls` of message 1 of line 1 is not valid JSON"),
        (
            {"from": "function_call", "value": "weather()"},
            "the call of message 1 of line 1 is not valid JSON",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_row(message: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read({"messages": [message]})


def write_parquet(rows: list[dict[str, Any]], folder: Path) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def save(rows: list[dict[str, Any]], folder: Path) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("write", [write_parquet, save])
def test_arrows_nulls_are_not_trained(
    write: Callable[[list[dict[str, Any]], Path], Path], tmp_path: Path
) -> None:
    rows = [
        {"messages": [say(USER, "Weather?"), say(ASSISTANT, None, tool_calls=[call({"city": "Ulm"})])], "tools": [tool("weather", city="string")]},
        {"messages": [say(USER, "2 and 2?"), say(ASSISTANT, None, tool_calls=[call({"a": 2, "b": 2}, "add")])], "tools": [tool("add", a="number", b="number")]},
    ]  # fmt: skip
    tokenizer = with_template(TOOLS_TEMPLATE)
    stored = [row for _, row in read_rows(TrainConfig(dataset_name=str(write(rows, tmp_path))))]
    assert [spelled(row, tokenizer) for row in stored] == [spelled(row, tokenizer) for row in rows]


def test_uneven_objects_that_datasets_keeps_as_json_come_back(tmp_path: Path) -> None:
    features = datasets.Features({"answer": datasets.Json(), "score": datasets.Value("float32")})
    rows = [
        {"answer": "two", "score": 0.1},
        {"answer": {"a": None}, "score": 2.0},
        {"answer": None, "score": None},
    ]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    stored = [row for _, row in read_rows(TrainConfig(dataset_name=str(tmp_path / "saved")))]
    assert stored == rows


# Columns, keys and roles of other names.


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ({"dialogue": [say(USER, "Hi"), say(ASSISTANT, "Hello")]}, {"field_mapping": "messages=dialogue"}),
        (
            {"q": [say(USER, "Hi")], "a": [say(ASSISTANT, "Hello")]},
            {"field_mapping": "prompt=q,completion=a"},
        ),
        (
            {"messages": [{"speaker": "person", "text": "Hi"}, {"speaker": "bot", "text": "Hello"}]},
            {"message_keys": "role=speaker,content=text", "role_names": "user=person,assistant=bot"},
        ),
        (
            {"conversations": [{"from": "person", "value": "Hi"}, {"from": "agent", "value": "Hello"}]},
            {"role_names": {"person": "user", "bot": "assistant", "agent": "assistant"}},
        ),
    ],
    ids=["a column", "two columns", "keys and roles", "roles in the other order"],
)
def test_other_names_are_named_rather_than_rewritten(row: dict[str, Any], given: dict[str, Any]) -> None:
    assert encode(row, build_tokenizer("chatml"), **given)[0] == [GREETING]


def test_a_column_that_is_named_comes_before_those_of_usual_names() -> None:
    row = {"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello")], "body": "So it is.", "question": "Why?"}
    assert encode(row, build_tokenizer("chatml"), field_mapping="text=body")[0] == ["S⟦o it is.<|im_end|>⟧"]
    chosen = choose_format(settings_of(field_mapping="instruction=question,output=body"), row, "rows")
    assert chosen.render(row, "line 1")["output"] == "### Response:\nSo it is."


def test_the_reason_tells_what_else_fitted() -> None:
    row = {"messages": [say(USER, "Hi")], "prompt": "a", "completion": "b", "text": "c"}
    why = choose_format(settings_of(), row, "rows").why
    assert (
        why
        == "there is a column `messages`; as prompt_completion and text they could be read too; not used: `prompt`, `completion`, `text`"
    )


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"field_mapping": "messages=talk"}, DataError, "column `talk`, absent from rows"),
        ({"field_mapping": "question=q"}, ConfigError, "no format's column"),
        ({"message_keys": "content=words"}, DataError, "`words`, which message_keys names"),
    ],
)
def test_a_name_that_is_not_there_is_refused(
    given: dict[str, Any], error: type[Exception], said: str
) -> None:
    row = {"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello")]}
    with pytest.raises(error, match=said):
        choose_format(settings_of(**given), row, "rows").render(row, "line 1")


@pytest.mark.parametrize("name", ["train_on", "system_prompt", "message_keys"])
def test_what_is_said_of_conversations_is_refused_of_other_rows(name: str) -> None:
    value = {"train_on": "all_turns", "system_prompt": "Be brief.", "message_keys": "role=speaker"}[name]
    with pytest.raises(ConfigError, match=f"`{name}` is for conversations"):
        choose_format(settings_of(**{name: value}), {"text": "a"}, "rows")


def test_the_system_prompt_goes_before_conversations_without_one() -> None:
    tokenizer = build_tokenizer("chatml")
    turns = [say(USER, "Hi"), say(ASSISTANT, "Hello")]
    (text,), _ = encode({"messages": turns}, tokenizer, system_prompt="Be brief.")
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + GREETING
    own = {"messages": [say("system", "Sing."), *turns]}
    assert encode(own, tokenizer, system_prompt="Be brief.") == encode(own, tokenizer)


@pytest.mark.parametrize(
    "made",
    [
        {"function": {"name": "weather", "parameters": {"city": "Ulm"}}},
        {"name": "weather", "input": {"city": "Ulm"}},
        {"function": {"name": "weather", "args": '{"city": "Ulm"}'}},
    ],
)
def test_the_arguments_of_a_call_have_several_names(made: dict[str, Any]) -> None:
    nested = made if "function" in made else {"function": made}
    row = {"messages": [say(USER, "Rain?"), say(ASSISTANT, None, tool_calls=[nested])]}
    assert spelled(row, with_template(TOOLS_TEMPLATE))[0].endswith(
        '⟦<call>{"name": "weather", "arguments": {"city": "Ulm"}}</call><|im_end|>⟧'
    )
    wrapped = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps(nested)},
        ]
    }
    assert spelled(wrapped, with_template(TOOLS_TEMPLATE)) == spelled(row, with_template(TOOLS_TEMPLATE))


@pytest.mark.parametrize("call_made", [{"function": "weather"}, {"function": {"arguments": {}}}, 3, None])
def test_a_call_without_a_name_is_refused(call_made: Any) -> None:
    with pytest.raises(DataError, match="call of message 2"):
        read({"messages": [say(USER, "Rain?"), say(ASSISTANT, "", tool_calls=[call_made])]})


def test_a_column_of_system_messages_may_hold_parts() -> None:
    talk = [say(USER, "Hi"), say(ASSISTANT, "Hello")]
    row = {"messages": talk, "system": [{"type": "text", "text": "Be brief."}]}
    assert spelled(row) == ["<|im_start|>system\nBe brief.<|im_end|>\n" + GREETING]


def test_what_is_not_read_is_refused_or_named() -> None:
    talk = [say(USER, "<image>What?"), say(ASSISTANT, "A cat")]
    with pytest.raises(DataError, match="`images` of line 1"):
        read({"messages": talk, "images": ["cat.png"]})
    with pytest.raises(DataError, match="`history`"):
        read({"instruction": "And now?", "output": "Rain", "history": [["a", "b"]]})
    chosen, _ = read({"prompt": "a", "completion": "b", "label": False})
    assert chosen.why.endswith("; not used: `label`")


def test_switches_and_decimals_are_written_as_people_write_them() -> None:
    chosen, rendered = read({"text": True})
    assert rendered["output"] == "true"
    assert chosen.render({"text": Decimal("0.00000010")}, "line 1")["output"] == "0.00000010"


def test_objects_that_arrow_keeps_as_maps_are_objects(tmp_path: Path) -> None:
    kind = pyarrow.struct([("properties", pyarrow.map_(pyarrow.string(), pyarrow.string()))])
    table = pyarrow.table(
        {"tools": pyarrow.array([{"properties": [("city", "string")]}], kind), "text": ["a"]}
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    ((_, row),) = read_rows(TrainConfig(dataset_name=str(tmp_path / "rows.parquet")))
    assert row["tools"] == {"properties": {"city": "string"}}


def test_a_conversation_may_be_json_text_in_a_table() -> None:
    talk = json.dumps([say(USER, "Hi"), say(ASSISTANT, "Hello")])
    assert spelled({"messages": talk}) == [GREETING]
    with pytest.raises(DataError, match="`messages` of line 1 is not valid JSON"):
        read({"messages": talk[:-1]})

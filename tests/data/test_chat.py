"""Conversations through chat templates: which turns are trained, what is left out, reasoning, dates, prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.conversations import (
    ASSISTANT,
    DATE,
    GREETING,
    USER,
    call,
    encode,
    prompt_of,
    say,
    settings_of,
    tool,
    trained,
)
from support.labels import spell, with_template
from support.tokenizers import TOKENIZER_KINDS, build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.config.layers import load_settings
from tunesmith.data.formats import Findings, choose_format
from tunesmith.data.prepare import prepare
from tunesmith.errors import ConfigError, DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


# Which turns are trained.

TALK = [say("system", "S"), say(USER, "a?"), say(ASSISTANT, "A"), say(USER, "b?"), say(ASSISTANT, "B")]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("all_assistant_turns", ["A<|im_end|>", "B<|im_end|>"]),
        ("last_assistant_turn", ["B<|im_end|>"]),
        (["user"], ["a?<|im_end|>", "b?<|im_end|>"]),
        ("system,assistant", ["S<|im_end|>", "A<|im_end|>", "B<|im_end|>"]),
    ],
)
def test_train_on_chooses_the_turns(train_on: Any, expected: list[str]) -> None:
    assert trained({"messages": TALK}, train_on=train_on) == expected


def test_all_turns_are_every_token_but_the_first() -> None:
    tokenizer = build_tokenizer("chatml")
    (text,), _ = encode({"messages": TALK}, tokenizer, train_on="all_turns")
    assert text.startswith("<|im_start|>⟦system\nS<|im_end|>\n<|im_start|>user\na?")
    assert text.count("⟦") == 1
    assert text.endswith("B<|im_end|>⟧")


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("last_assistant_turn", ["a?<|im_end|>"]),
        ("assistant", ["a?<|im_end|>", "A<|im_end|>"]),
        ("all_turns", ["system\nS<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n"]),
    ],
)  # fmt: skip
def test_what_a_row_says_comes_before_train_on(train_on: str, expected: list[str]) -> None:
    messages = [dict(message) for message in TALK]
    messages[1]["train"], messages[4]["weight"] = True, 0
    assert trained({"messages": messages}, train_on=train_on) == expected


@pytest.mark.parametrize("value", ["all_assistant_turn", "robots", "user,robots"])
def test_turns_that_there_are_not_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="all_assistant_turns, last_assistant_turn, all_turns, or roles"):
        load_settings(TrainConfig, None, {"train_on": value}, {})


# What the template leaves out.


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') and m.content %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        (
            {"messages": [say("system", "Hi"), say(USER, "Hi"), say(ASSISTANT, "Hello")]},
            "the text of a `system` message",
        ),
        ({"messages": [say(USER, ""), say(USER, "Hi"), say(ASSISTANT, "Hello")]}, "an empty `user` message"),
        ({"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello", tool_calls=[call({})])]}, "a tool call"),
        ({"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello")], "tools": [tool("f")]}, "the list of tools"),
        ({"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello", thinking="Polite.")]}, "the reasoning"),
    ],
    ids=["system", "empty", "call", "tools", "reasoning"],
)
def test_what_the_template_leaves_out_is_refused_or_counted(row: dict[str, Any], left_out: str) -> None:
    tokenizer = with_template(NO_SYSTEM)
    with pytest.raises(DataError, match=f"the chat template leaves out {left_out}"):
        encode(row, tokenizer)
    texts, findings = encode(row, tokenizer, unrendered="count")
    assert texts == [GREETING]
    assert findings[f"rows of which the chat template leaves out {left_out}"] == 1


def test_a_text_beside_a_call_is_missed_too() -> None:
    either = NO_SYSTEM.replace(
        "+ m.content +", "+ (m.tool_calls[0].function.name if m.tool_calls else m.content) +"
    )
    talk = [say(USER, "Rain?"), say(ASSISTANT, "Let me see.", tool_calls=[call({})])]
    with pytest.raises(DataError, match="leaves out the text of an `assistant` message"):
        encode({"messages": talk}, with_template(either))


def test_a_text_that_the_template_changes_is_refused() -> None:
    shouting = NO_SYSTEM.replace("+ m.content", "+ m.content | upper")
    with pytest.raises(DataError, match="the text of a `user` message, or changes it"):
        encode({"messages": [say(USER, "Hi"), say(ASSISTANT, "HELLO")]}, with_template(shouting))


@pytest.mark.parametrize("written", ["m.content | tojson", "m.content | replace('\\n', '')", "m.content"])
def test_what_a_tool_returns_may_be_written_as_json(written: str) -> None:
    template = NO_SYSTEM.replace("('user',", "('tool', 'user',").replace(
        "+ m.content +", "+ (" + written + " if m.role == 'tool' else m.content) +"
    )
    result = '{"sky": "blue",\n "wind": 3}'
    talk = [say(USER, "Rain?"), say(ASSISTANT, "Let me see."), say("tool", result), say(ASSISTANT, "No.")]
    (text,), findings = encode({"messages": talk}, with_template(template))
    assert text.endswith("⟦No.<|im_end|>⟧")
    assert not findings


def test_a_key_that_nothing_uses_is_named_with_its_count() -> None:
    row = {"messages": [say(USER, "Hi", id=1), say(ASSISTANT, "Hello", id=2, mood="good")]}
    texts, findings = encode(row, build_tokenizer("chatml"))
    assert texts == [GREETING]
    assert findings == {
        "messages with the key `id`, which neither this program nor the chat template uses": 2,
        "messages with the key `mood`, which neither this program nor the chat template uses": 1,
    }
    knows_mood = with_template(NO_SYSTEM.replace("+ m.content", "+ (m.mood or '') + m.content"))
    assert (
        "messages with the key `mood`, which neither this program nor the chat template uses"
        not in encode(row, knows_mood, unrendered="count")[1]
    )


def test_a_template_that_knows_parts_alone_gets_parts() -> None:
    parts = NO_SYSTEM.replace("+ m.content", "+ m.content[0].text").replace("m.content and", "m.content")
    row = {"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello")]}
    assert encode(row, with_template(parts))[0] == [GREETING]


@pytest.mark.parametrize(("role", "known"), [("developer", "system"), ("function", "tool")])
def test_a_role_that_goes_by_two_names_gets_the_one_that_the_template_knows(role: str, known: str) -> None:
    template = NO_SYSTEM.replace("('user',", f"('{known}', 'user',")
    messages = [say(USER, "Hi"), say(ASSISTANT, "Hello"), say(USER, "Bye"), say(ASSISTANT, "So long")]
    messages.insert(0 if known == "system" else 2, say(role, "Be brief."))
    (text,), _ = encode({"messages": messages}, with_template(template))
    assert f"<|im_start|>{known}\nBe brief.<|im_end|>" in text


# Reasoning.

R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}{% else %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<A>' + c + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}"
)
REASON, BLOCK = "Two and two.", "<think>\nTwo and two.\n</think>\n\n4"
REASONED = [
    say(ASSISTANT, BLOCK),
    say(ASSISTANT, "4", reasoning_content=REASON),
    say(ASSISTANT, "4", thinking=REASON),
]


@pytest.mark.parametrize("answer", REASONED, ids=["inline", "reasoning_content", "thinking"])
@pytest.mark.parametrize("kind", ["qwen3", "r1"])
def test_reasoning_is_trained_as_inference_sees_it(answer: dict[str, Any], kind: str) -> None:
    tokenizer = with_template(R1) if kind == "r1" else build_tokenizer("qwen3")
    row = {"messages": [say(USER, "2+2?"), answer]}
    asked = (
        "<U>2+2?<A><think>\n" if kind == "r1" else "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    block = BLOCK.removeprefix("<think>\n") if kind == "r1" else BLOCK
    assert encode(row, tokenizer)[0] == [f"{asked}⟦{block}<|im_end|>⟧"]
    assert prompt_of(row, tokenizer).text == asked
    untrained = block.removesuffix("4")
    assert encode(row, tokenizer, train_on_reasoning=False)[0] == [f"{asked}{untrained}⟦4<|im_end|>⟧"]
    assert prompt_of(row, tokenizer, train_on_reasoning=False).text == asked


def test_an_answer_without_reasoning_is_asked_as_it_was_trained() -> None:
    row = {"messages": [say(USER, "2+2?"), say(ASSISTANT, "4")]}
    assert encode(row, with_template(R1))[0] == ["<U>2+2?<A>⟦4<|im_end|>⟧"]
    assert prompt_of(row, with_template(R1)).text == "<U>2+2?<A>"
    # The empty block that Qwen3 writes is no reasoning to learn either.
    (text,), _ = encode(row, build_tokenizer("qwen3"), train_on_reasoning=False)
    assert text.endswith("<think>\n\n</think>\n\n⟦4<|im_end|>⟧")


def test_a_plain_template_keeps_a_block_that_stands_in_the_content() -> None:
    row = {"messages": [say(USER, "2+2?"), say(ASSISTANT, BLOCK)]}
    assert trained(row) == [f"{BLOCK}<|im_end|>"]
    assert trained(row, train_on_reasoning=False) == ["4<|im_end|>"]


# One beginning, one prompt, one day.


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@given(question=TEXT, answer=TEXT)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_prompts_ids_are_the_beginning_of_the_trained_ones(kind: str, question: str, answer: str) -> None:
    tokenizer = build_tokenizer(kind)
    row = {"question": question, "answer": answer}
    given = {"input_template": "Q: {question}\nA: ", "output_template": " so {answer}"}
    chosen = choose_format(settings_of(**given), row, "rows").with_tokenizer(tokenizer, DATE)
    rendered = chosen.render(row, "line 1")
    prompt = chosen.prompt(rendered)
    if prompt is None:
        assert not answer.strip()
        return
    ((example,),) = chosen.encode([rendered], Findings())
    (segment,) = example.segments
    assert list(prompt.input_ids) == segment.input_ids[: len(prompt.input_ids)]
    # What isn't asked is trained, but for the fixed text that every answer begins with.
    assert segment.spans[0][0] <= len(prompt.input_ids)
    if kind in ("byte_bpe", "llama2"):  # others have no token for some of the characters
        assert len(prompt.text) <= len(rendered["input"] + " so ")
    assert (rendered["input"] + rendered["output"]).startswith(prompt.text)


def test_a_blank_before_the_answer_belongs_to_the_answer() -> None:
    prompt = prompt_of(
        {"q": "2+2", "a": "the"},
        build_tokenizer("byte_bpe"),
        input_template="{q}\n### Answer: ",
        output_template="{a}",
    )
    assert (prompt.text, prompt.reference) == ("2+2\n### Answer:", "the")


@pytest.mark.parametrize("kind", ["llama2", "unigram", "wordpiece", "byte_bpe"])
def test_a_beginning_and_an_end_that_the_text_brings_stand_once(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    row = {"text": f"{bos or ''}so it is{eos}"}
    (text,), _ = encode(row, tokenizer)
    (plain,), _ = encode({"text": "so it is"}, tokenizer)
    assert text.count(eos) == plain.count(eos) == (2 if bos == eos else 1)
    assert bos is None or text.count(bos) == max(plain.count(bos), 1)


DATED = "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + NO_SYSTEM


def test_a_date_in_the_template_is_one_date() -> None:
    (text,), _ = encode({"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello")]}, with_template(DATED))
    assert text == "<|im_start|>system\n31 Jan 2026<|im_end|>\n" + GREETING


def test_the_date_is_kept_with_the_data(tmp_path: Path) -> None:
    rows = [{"messages": [say(USER, f"{i}?"), say(ASSISTANT, f"{i}.")]} for i in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(dataset_name=str(file), max_seq_length=64, num_proc=1)
    days = [
        prepare(config, with_template(DATED), tmp_path / "data", day) for day in ("2026-01-31", "2026-02-01")
    ]
    assert [prepared.date for prepared in days] == ["2026-01-31", "2026-02-01"]
    assert days[0].fingerprint != days[1].fingerprint
    assert days[0].data_dir == days[1].data_dir
    undated = prepare(config, build_tokenizer("chatml"), tmp_path / "data", "2026-01-31")
    assert undated.date is None
    assert undated.fingerprint == prepare(config, build_tokenizer("chatml"), tmp_path / "data").fingerprint


# What was found by trying.


@pytest.mark.parametrize("said", ["user", "s", "<"])
def test_a_turn_begins_with_its_own_content_wherever_that_stands_too(said: str) -> None:
    talk = [say(USER, said), say(ASSISTANT, "s user"), say(USER, said), say(ASSISTANT, "B")]
    assert trained({"messages": talk}, train_on="user,assistant") == [
        f"{said}<|im_end|>", "s user<|im_end|>", f"{said}<|im_end|>", "B<|im_end|>"
    ]  # fmt: skip


def test_an_untrained_message_that_changes_what_is_before_it_is_refused() -> None:
    talk = [say(USER, "a"), say(ASSISTANT, "BAD", weight=0), say(USER, "b"), say(ASSISTANT, "B")]
    with pytest.raises(DataError, match="can't be trained faithfully"):
        encode({"messages": talk}, build_tokenizer("qwen3"), train_on="all_turns")


def test_the_answer_behind_reasoning_is_the_last_thing_said() -> None:
    channels = NO_SYSTEM.replace(
        "+ m.content +", "+ ('<a>' + m.thinking + '<f>' if m.thinking and loop.last else '') + m.content +"
    )
    row = {"messages": [say(USER, "a"), say(ASSISTANT, "f", thinking="fa")]}
    (text,), _ = encode(row, with_template(channels), train_on_reasoning=False)
    assert text.endswith("<a>fa<f>⟦f<|im_end|>⟧")


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n4", "</think>\n\n4", "4"])
def test_an_empty_block_is_written_once(block: str) -> None:
    keyed = NO_SYSTEM.replace(
        "+ m.content +",
        "+ ('<think>' + (m.reasoning_content or '') + '</think>' if m.role == 'assistant' else '') + m.content +",
    )
    (text,), _ = encode({"messages": [say(USER, "2+2?"), say(ASSISTANT, block)]}, with_template(keyed))
    assert text.endswith("⟦<think></think>4<|im_end|>⟧")


def test_half_a_block_is_reasoning_behind_an_open_one() -> None:
    row = {"messages": [say(USER, "2+2?"), say(ASSISTANT, "Hm.\n</think>\n\n4")]}
    assert encode(row, with_template(R1))[0] == ["<U>2+2?<A><think>\n⟦Hm.\n</think>\n\n4<|im_end|>⟧"]


def test_a_template_that_always_goes_on_is_refused() -> None:
    always = NO_SYSTEM.replace("{% if add_generation_prompt %}", "{% if true %}")
    with pytest.raises(DataError, match="begins another turn behind each answer"):
        encode({"messages": [say(USER, "Hi"), say(ASSISTANT, "Hello")]}, with_template(always))


def test_a_template_that_fails_is_an_error_of_the_row() -> None:
    failing = NO_SYSTEM.replace("+ m.content +", "+ m.content.format() +")
    with pytest.raises(DataError, match="refuses the conversation"):
        encode({"messages": [say(USER, "{0}"), say(ASSISTANT, "Hello")]}, with_template(failing))


def test_a_greeting_behind_a_system_message_answers_nothing() -> None:
    talk = [say("system", "S"), say(ASSISTANT, "Welcome"), say(USER, "a"), say(ASSISTANT, "A")]
    assert (
        trained({"messages": talk}) == trained({"messages": talk[1:]}, system_prompt="S") == ["A<|im_end|>"]
    )


def test_what_was_counted_is_refused_where_it_is_not_to_be(tmp_path: Path) -> None:
    talk = [say("system", "Be brief."), say(USER, "Hi"), say(ASSISTANT, "Hello")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    config = TrainConfig(
        dataset_name=str(tmp_path / "rows.jsonl"),
        train_split_ratio=1.0,
        max_seq_length=64,
        num_proc=1,
        unrendered="count",
    )
    prepared = prepare(config, with_template(NO_SYSTEM), tmp_path / "sets")
    assert sum(prepared.stats.train.findings.values()) == 1
    with pytest.raises(DataError, match="leaves out the text of a `system` message"):
        prepare(
            config.model_copy(update={"unrendered": "refuse"}), with_template(NO_SYSTEM), tmp_path / "sets"
        )


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n"])
def test_an_end_token_that_an_answer_brings_is_the_only_one(end: str) -> None:
    tokenizer = build_tokenizer("chatml")
    talk = [say(USER, "a"), say(ASSISTANT, f"A{end}"), say(USER, "b"), say(ASSISTANT, f"B{end}")]
    assert trained({"messages": talk}) == ["A<|im_end|>", "B<|im_end|>"]
    assert trained({"prompt": "a ", "completion": f"A{end}"}) == ["A<|im_end|>"]
    chosen = choose_format(settings_of(), {"text": f"so{end}"}, "rows").with_tokenizer(tokenizer, DATE)
    ((example,),) = chosen.encode([{"input": "", "output": f"so{end}"}], Findings())
    assert spell(tokenizer, example.segments[0]).count("<|im_end|>") == 1
    assert len(example.segments[0].spans) == 1

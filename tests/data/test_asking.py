"""What a person asks becomes the prompt that training would have made: its ids are the beginning of the trained ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from support.own_templates import OWN_TEMPLATES
from support.tokenizers import TOKENIZER_KINDS, build_tokenizer
from tunesmith.config import HFDatasetConfig
from tunesmith.data.asking import Exchange, Questions, Said, questions_for
from tunesmith.data.formats import Findings, RowFormat, choose_format
from tunesmith.errors import DataError

DATE = "2026-01-31"
Row = Mapping[str, Any]


def trained_prompt(row_format: RowFormat, row: Row) -> tuple[int, ...]:
    """Return the ids of a row's example up to its last trained run: the answer."""
    (examples,) = row_format.encode([row_format.render(row, "row 1")], Findings())
    segment = examples[-1].segments[0]
    return tuple(segment.input_ids[: segment.spans[-1][0]])


def asking(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    settings: HFDatasetConfig | None = None,
    samples: bool = True,
    system_prompt: str | None = None,
) -> tuple[RowFormat, Questions]:
    settings = settings or HFDatasetConfig()
    row_format = choose_format(settings, rows[0], "rows").with_tokenizer(tokenizer, DATE)
    rendered = [row_format.render(row, "row") for row in rows] if samples else []
    return row_format, questions_for(row_format, tokenizer, rendered, system_prompt)


def chat(*turns: str, **answer: str) -> dict[str, Any]:
    """Return a conversation of a user and an assistant in turn, with `answer` added to its last message."""
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    messages[-1].update(answer)
    return {"messages": messages}


def with_system(row: dict[str, Any], text: str = "Be brief.") -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": text}, *row["messages"]]}


PLAIN = [chat("12 plus 30?", "42"), chat("Why?", "Because it is."), chat("Who?", "Paris — 你好")]


@pytest.mark.parametrize("knows_rows", [True, False])
@pytest.mark.parametrize("reasons", [True, False])
@pytest.mark.parametrize("family", OWN_TEMPLATES)
def test_a_conversation_is_asked_as_its_rows_were_trained(
    family: str, reasons: bool, knows_rows: bool
) -> None:
    own = OWN_TEMPLATES[family]
    if reasons > own.reasons or (family == "deepseek_r1" and not reasons and not knows_rows):
        return  # it knows no reasoning; or where nothing is known of its rows, it is asked to reason
    rows = [{"messages": own.talk(name)} for name in ("Ada", "Bo")]
    for row in rows if not reasons else []:
        row["messages"][-1].pop("reasoning_content", None)
    tokenizer = own.build_tokenizer()
    system = None if knows_rows or not own.takes_system else rows[0]["messages"][0]["content"]
    row_format, questions = asking(tokenizer, rows, samples=knows_rows, system_prompt=system)
    for row in rows:
        *_, asked, answered, question, _ = row["messages"]
        before = [Exchange({"user": asked["content"]}, answered["content"])]
        found = questions.prompt({"user": question["content"]}, before).input_ids
        assert found == trained_prompt(row_format, row)
    assert questions.end_tokens == {tokenizer.convert_tokens_to_ids(own.end)}


def test_reasoning_that_an_answer_brought_is_taken_off_as_in_training() -> None:
    own = OWN_TEMPLATES["qwen3"]
    row = chat(
        "Who?", "<think>\nHm.\n</think>\n\nMe", "And?", "You", "So?", "Well", reasoning_content="Let me see."
    )
    row_format, questions = asking(own.build_tokenizer(), [row])
    said = [message["content"] for message in row["messages"]]
    before = [Exchange({"user": said[i]}, said[i + 1]) for i in (0, 2)]
    found = questions.prompt({"user": "So?"}, before)
    assert found.input_ids == trained_prompt(row_format, row) and "Hm." not in found.text


def test_a_system_prompt_of_all_rows_is_asked_with_unless_another_is_given() -> None:
    tokenizer = OWN_TEMPLATES["qwen3"].build_tokenizer()
    rows = [with_system(row) for row in PLAIN]
    _, questions = asking(tokenizer, rows)
    assert "Be brief." in questions.prompt({"user": "Why?"}).text
    for given, shown in (("Be long.", True), ("", False)):
        text = asking(tokenizer, rows, system_prompt=given)[1].prompt({"user": "Why?"}).text
        assert "Be brief." not in text
        assert ("Be long." in text) == shown
    _, questions = asking(tokenizer, [rows[0], with_system(PLAIN[1], "Another.")])
    assert "<|im_start|>system" not in questions.prompt({"user": "Why?"}).text


def test_what_the_template_refuses_is_said() -> None:
    with pytest.raises(DataError, match="System role not supported"):
        asking(OWN_TEMPLATES["gemma2"].build_tokenizer(), PLAIN, system_prompt="x")[1].prompt(
            {"user": "Why?"}
        )


SUMS = [
    {"question": "12 plus 30?", "answer": "42"},
    {"question": "Why?", "answer": "Because it is."},
    {"question": "Who", "answer": "The capital"},
    {"question": "Größe 你", "answer": "that is Paris"},
]
TEMPLATES = {
    "blank": ("{instruction} ", "{output}"),
    "opening": ("### Instruction:\n{instruction}\n ### Input:\n\n", "### Response:\n{output}"),
    "blank in the output": ("Q: {instruction}\n", "A: {output}"),
    "newlines": ("{instruction}\n\n", "{output}\n"),
    "nothing between": ("{instruction}", "{output}"),
}


# This Llama 2's pieces reach from one word into the next, as no real one's do.
KINDS = [kind for kind in TOKENIZER_KINDS if kind not in ("smollm2", "llama2")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_users_words_fill_the_runs_template(kind: str, template: str) -> None:
    settings = HFDatasetConfig(
        input_template=TEMPLATES[template][0],
        output_template=TEMPLATES[template][1],
        field_mapping={"instruction": "question", "output": "answer"},
    )
    rows = SUMS[1:]
    row_format, questions = asking(build_tokenizer(kind), rows, settings)
    assert questions.fields == ("instruction",)
    lengths = []
    for row in rows:
        found = questions.prompt({"instruction": row["question"]}).input_ids
        prompt = row_format.prompt(row_format.render(row, "row"))
        assert prompt is not None
        lengths.append(len(prompt.input_ids) - len(found))
        (example,) = next(iter(row_format.encode([row_format.render(row, "row")], Findings())))
        assert tuple(example.segments[0].input_ids[: len(found)]) == found
    # Equal but for rows whose answer doesn't take along the blank before it, as others' do.
    assert min(lengths) == 0 and max(lengths) <= 1


def test_answers_decide_whether_a_blank_before_them_is_theirs() -> None:
    """Before a Z it stands alone with this tokenizer, before a known word it is the word's."""
    settings = HFDatasetConfig(input_template="{q} ", output_template="{a}")
    tokenizer = build_tokenizer("byte_bpe")
    unknown = [{"q": "1 and 2", "a": f"Z{number}"} for number in range(9)]
    words = [*unknown[:6], {"q": "Is it", "a": "that"}]
    of_unknown = asking(tokenizer, [*unknown, words[-1]], settings)[1].prompt({"q": "So"})
    of_words = asking(tokenizer, words, settings)[1].prompt({"q": "So"})
    assert (of_unknown.text, of_words.text) == ("So ", "So")


def test_several_placeholders_are_fields_of_their_own() -> None:
    settings = HFDatasetConfig(input_template="{b} of {a}: ", output_template="{c}")
    _, questions = asking(build_tokenizer("byte_bpe"), [{"a": "x", "b": "y", "c": "that"}], settings)
    assert questions.fields == ("b", "a")
    assert questions.prompt({"a": "one", "b": "two"}).text.startswith("two of one:")
    assert questions.prompt({"b": "two"}).text.startswith("two of :")


def said_of(questions: Questions, text: str) -> Said:
    return {questions.fields[0]: text}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_gone_on_with(kind: str) -> None:
    rows = [{"text": "some plain words here, and more there"}, {"text": "x = 1\n    y = 2 + b"}]
    row_format, questions = asking(build_tokenizer(kind), rows)
    for row in rows:
        (example,) = next(iter(row_format.encode([row_format.render(row, "row")], Findings())))
        trained = tuple(example.segments[0].input_ids)
        for end in ("some plain words", "some plain words ", "x = 1\n    y ="):
            if row["text"].startswith(end):
                found = questions.prompt(said_of(questions, end)).input_ids
                assert len(found) > 2
                assert trained[: len(found)] == found


def test_a_template_that_asks_nothing_is_gone_on_with_too() -> None:
    settings = HFDatasetConfig(input_template="", output_template="Note: {body}")
    _, questions = asking(build_tokenizer("byte_bpe"), [{"body": "The quick"}], settings)
    assert questions.prompt(said_of(questions, "The")).text == "Note: The"


def test_a_system_prompt_is_for_conversations() -> None:
    with pytest.raises(DataError, match="`system_prompt` is for conversations"):
        asking(build_tokenizer("byte_bpe"), [{"text": "x"}], system_prompt="Be brief.")

"""What a person asks becomes the prompt that training would have made: its ids are the beginning of the trained ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from support.chat_templates import CHAT_TEMPLATES, build_chat_tokenizer
from transformers import PreTrainedTokenizerFast

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
REASONED = [chat(*(m["content"] for m in row["messages"]), reasoning_content="Let me see.") for row in PLAIN]


CASES = [
    ("qwen3", "plain"),
    ("qwen3", "reasoned"),
    ("qwen3", "system"),
    ("llama3", "plain"),
    ("llama3", "system"),
    ("gemma", "plain"),
    ("r1", "plain"),
    ("r1", "reasoned"),
    ("r1", "reasoned system"),
]


@pytest.mark.parametrize(
    ("family", "kind", "knows_rows"),
    # Where nothing is known of its rows, a model whose template opens the reasoning is asked to reason.
    [(*case, knows) for case in CASES for knows in (True, False) if knows or case != ("r1", "plain")],
)
def test_a_question_is_asked_as_the_rows_were_trained(family: str, kind: str, knows_rows: bool) -> None:
    rows = REASONED if "reasoned" in kind else PLAIN
    rows = [with_system(row) for row in rows] if "system" in kind else rows
    tokenizer = build_chat_tokenizer(family)
    system = None if knows_rows or "system" not in kind else "Be brief."
    row_format, questions = asking(tokenizer, rows, samples=knows_rows, system_prompt=system)
    for row in rows:
        question = row["messages"][-2]["content"]
        assert questions.prompt({"user": question}).input_ids == trained_prompt(row_format, row)
    token = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "r1": "<|end|>"}[family]
    assert questions.end_tokens == {tokenizer.convert_tokens_to_ids(token)}


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_earlier_turns_are_as_a_conversation_of_several_turns_is_trained(family: str) -> None:
    rows = [
        chat("12 plus 30?", "42", "And 5?", "47", "Why?", "Because."),
        chat(
            "Who?",
            "<think>\nHm.\n</think>\n\nMe",
            "And?",
            "You",
            "So?",
            "Well",
            reasoning_content="Let me see.",
        ),
    ]
    rows = {"qwen3": rows, "r1": rows[1:]}.get(family, rows[:1])
    row_format, questions = asking(build_chat_tokenizer(family), rows)
    for row in rows:
        said = [message["content"] for message in row["messages"]]
        before = [Exchange({"user": said[i]}, said[i + 1]) for i in (0, 2)]
        found = questions.prompt({"user": said[4]}, before).input_ids
        assert found == trained_prompt(row_format, row)


def test_a_system_prompt_of_all_rows_is_asked_with_unless_another_is_given() -> None:
    tokenizer = build_chat_tokenizer("qwen3")
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
        asking(build_chat_tokenizer("gemma"), PLAIN, system_prompt="x")[1].prompt({"user": "Why?"})


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

"""What of an answer is compared: without its reasoning, whoever opened it, and without special tokens."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from support.tokenizers import build_tokenizer
from tunesmith.evaluate.answers import Answer, AnswerReader
from tunesmith.evaluate.metrics.calls import parse_calls

HARMONY = ("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|return|>", "<|call|>")
SPECIAL = (*HARMONY, "[THINK]", "[/THINK]", "[TOOL_CALLS]", "<|python_tag|>", "<|eot_id|>")
ASKED = "user: 2 + 2?\nassistant:"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer to which think blocks and the marks of calls and channels are special, as to many models."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer("chatml").backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    made.add_tokens([AddedToken(token, special=True) for token in SPECIAL], special_tokens=True)
    made.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    return made


def read(tokenizer: PreTrainedTokenizerFast, said: str, prompt: str = ASKED) -> Answer:
    ids = tokenizer(said, add_special_tokens=False).input_ids
    answer = AnswerReader(tokenizer).read_generated(ids, prompt)
    if answer.ended:  # by the same rules, but for a block that the reference's row leaves out
        assert AnswerReader(tokenizer).read_reference(said, prompt) == answer
    return answer


@pytest.mark.parametrize(
    ("said", "prompt", "expected"),
    [
        ("4", ASKED, Answer("4")),
        ("<think>\nTwo and two.\n</think>\n\n4", ASKED, Answer("4", "Two and two.")),
        ("<think>\n\n</think>\n\n4", ASKED, Answer("4")),
        ("Two and two.\n</think>\n\n4", f"{ASKED}<think>\n", Answer("4", "Two and two.")),
        ("<think>Two and two.</think>4", f"{ASKED}<think>\n", Answer("4", "Two and two.")),
        ("Two and two.</think>4", ASKED, Answer("4", "Two and two.")),
        ("4", f"{ASKED}<think>\n\n</think>\n\n", Answer("4")),
        ("<think>One.</think><think>Two.</think> 4", ASKED, Answer("4", "One.\n\nTwo.")),
        ("[THINK]Two and two.[/THINK]4", ASKED, Answer("4", "Two and two.")),
        ("Write <think>…</think> around it", ASKED, Answer("Write <think>…</think> around it")),
        ("4<|im_end|>", ASKED, Answer("4")),
        ("<|channel|>final<|message|>4", ASKED, Answer("4")),
        (
            "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            ASKED,
            Answer("4", "Two and two."),
        ),
    ],
)
def test_reasoning_is_taken_off(
    tokenizer: PreTrainedTokenizerFast, said: str, prompt: str, expected: Answer
) -> None:
    assert read(tokenizer, said, prompt) == expected


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("<think>\nTwo and two, or", ASKED),
        ("Two and two, or", f"{ASKED}<think>\n"),
        ("[THINK]Two and two, or", ASKED),
        ("<|channel|>analysis<|message|>Two and two, or", ASKED),
        ("<|channel|>analysis<|message|>Two and two, or<|end|><|start|>assistant<|channel|>fi", ASKED),
    ],
)
def test_reasoning_that_never_ends_leaves_nothing_to_compare(
    tokenizer: PreTrainedTokenizerFast, said: str, prompt: str
) -> None:
    assert read(tokenizer, said, prompt) == Answer("", "Two and two, or", ended=False)


def test_a_reference_may_leave_out_the_block_that_its_prompt_opens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    reader = AnswerReader(tokenizer)
    assert reader.read_reference("4", f"{ASKED}<think>\n") == Answer("4")


@pytest.mark.parametrize(
    "said",
    [
        '<think>A tool.</think>[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}}]<|im_end|>',
        '<think>A tool.</think><|python_tag|>{"name": "add", "parameters": {"a": 2}}<|eot_id|>',
        "<|channel|>analysis<|message|>A tool.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
        '<|constrain|>json<|message|>{"a": 2}<|call|>',
        "<|channel|>analysis<|message|>A tool.<|end|><|start|>assistant to=functions.add<|channel|>commentary json"
        '<|message|>{"a": 2}',
    ],
)
def test_calls_keep_the_marks_that_they_are_written_with(
    tokenizer: PreTrainedTokenizerFast, said: str
) -> None:
    answer = read(tokenizer, said)
    assert answer.reasoning == "A tool."
    assert parse_calls(answer.text) == [("add", '{"a": 2}')]
    assert "<|im_end|>" not in answer.text and "<|eot_id|>" not in answer.text

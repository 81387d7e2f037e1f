"""What of an answer is compared: without its reasoning, whoever opened it, and without special tokens."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from support.conversations import ASSISTANT, USER, call, prompt_of, say, trained
from support.tokenizers import CHATML_TEMPLATE, QWEN3_TEMPLATE, build_tokenizer
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


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}{% else %}"
    "{{ '<A>' + m.content.split('</think>')[-1].lstrip() + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}"
)
OWN_MARKS = CHATML_TEMPLATE.replace(
    "message['content'] +",
    "('<plan>' + message.thinking + '<say>' if message.thinking else '') + message['content'] +",
)
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'user' %}{{ '<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{% if m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ ' to=functions.' + f.name + '<|channel|>commentary json<|message|>' + (f.arguments | tojson) + '<|call|>' }}"
    "{% else %}{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ '[TOOL_CALLS]' + f.name + (f.arguments | tojson) }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
)
THOUGHT = "Two and two."
INLINE = say(ASSISTANT, f"<think>\n{THOUGHT}\n</think>\n\n4")
CALL = say(ASSISTANT, "", tool_calls=[call({"city": "Ulm"})])


@pytest.mark.parametrize(
    ("template", "answer", "reasoning"),
    [
        (CHATML_TEMPLATE, say(ASSISTANT, "4"), ""),
        (CHATML_TEMPLATE, INLINE, THOUGHT),
        (QWEN3_TEMPLATE, say(ASSISTANT, "4"), ""),
        (QWEN3_TEMPLATE, INLINE, THOUGHT),
        (QWEN3_TEMPLATE, say(ASSISTANT, "4", reasoning_content=THOUGHT), THOUGHT),
        (R1, say(ASSISTANT, "4"), ""),
        (R1, INLINE, THOUGHT),
        (R1, say(ASSISTANT, "4", thinking=THOUGHT), THOUGHT),
        (OWN_MARKS, say(ASSISTANT, "4", thinking=THOUGHT), THOUGHT),
        (OWN_MARKS, say(ASSISTANT, "4"), ""),
        (CHANNELS, say(ASSISTANT, "4"), ""),
        (CHANNELS, say(ASSISTANT, "4", thinking=THOUGHT), THOUGHT),
        (CHANNELS, CALL, ""),
        (CHANNELS, {**CALL, "thinking": THOUGHT}, THOUGHT),
        (MISTRAL, say(ASSISTANT, "4"), ""),
        (MISTRAL, CALL, ""),
    ],
)
def test_what_was_trained_is_the_right_answer_to_the_letter(
    tokenizer: PreTrainedTokenizerFast, template: str, answer: dict[str, Any], reasoning: str
) -> None:
    """A model that says just what it was taught is right by every metric."""
    taught = pickle.loads(pickle.dumps(tokenizer))
    taught.chat_template = template
    row = {"messages": [say(USER, "2 + 2?"), answer]}
    prompt = prompt_of(row, taught)
    (said,) = trained(row, taught)
    reader = AnswerReader(taught)
    ids = taught(said, add_special_tokens=False).input_ids
    found = reader.read_generated(ids, prompt.text)
    expected = reader.read_reference(prompt.reference, prompt.text)
    assert (found.text, found.reasoning, found.ended) == (expected.text, reasoning, True)
    assert found.text.strip() == "4" or parse_calls(found.text) == [("weather", '{"city": "Ulm"}')]

"""Rows → text → labels: what is trained is the completion and the end token, and nothing of the prompt."""

from __future__ import annotations

import pickle
import unicodedata
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from support.labels import spell, with_template
from support.tokenizers import CHATML_TEMPLATE, TOKENIZER_KINDS, build_tokenizer
from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.encode import RowError
from tunesmith.data.examples import Segment
from tunesmith.data.formats import Findings, RowFormat, choose_format, format_named
from tunesmith.data.formats.template import parse_template
from tunesmith.errors import ConfigError, DataError, ModelError

DATE = "2026-01-31"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ASCII = st.text(st.sampled_from("abc XYZ.,19-"), min_size=1, max_size=40)


def choose(columns: list[str], **given_settings: Any) -> RowFormat:
    config = TrainConfig(dataset_name="rows.jsonl", **given_settings)
    return choose_format(config, dict.fromkeys(columns, ""), "`rows.jsonl` (train)")


def encode_as(name: str, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> list[Segment]:
    """Return the segments of one rendered row, whose examples have one each."""
    (examples,) = (
        format_named(name, HFDatasetConfig()).with_tokenizer(tokenizer, DATE).encode([row], Findings())
    )
    return [segment for example in examples for segment in example.segments]


def encode(kind: str, prompt: str, completion: str) -> Segment:
    (example,) = encode_as("template", build_tokenizer(kind), {"input": prompt, "output": completion})
    return example


def trained_text(tokenizer: PreTrainedTokenizerFast, example: Segment) -> str:
    ids = [i for i, trained in zip(example.input_ids, example.trained, strict=True) if trained]
    return str(tokenizer.decode(ids))


# Templates and row formats.


def test_a_template_fills_columns_and_keeps_doubled_braces() -> None:
    row_format = choose(["q", "a"], input_template="{{x}} {q}: ", output_template="{a}}}")
    assert row_format.render({"q": "{a}", "a": 3}, "row 1") == {"input": "{x} {a}: ", "output": "3}"}


@pytest.mark.parametrize("text", ["{a", "a}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{}", "{ a }", "{a{b}}"])
def test_a_malformed_template_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="input_template"):
        parse_template(text, "input_template")


@given(TEXT)
def test_a_value_is_never_read_as_a_template(value: str) -> None:
    row_format = choose(["text2"], input_template="{text2}", output_template="{text2}")
    assert row_format.render({"text2": value}, "row 1")["input"] == value


def test_default_templates_are_chosen_when_the_columns_fill_them() -> None:
    row_format = choose(["instruction", "input", "output", "text"])
    assert row_format.name == "template"
    row = {"instruction": "Add.", "input": None, "output": "3"}
    assert row_format.render(row, "row 1") == {
        "input": "### Instruction:\nAdd.\n ### Input:\n\n",
        "output": "### Response:\n3",
    }


def test_the_formats_have_an_order() -> None:
    columns = ["text", "instruction", "output", "prompt", "completion", "conversations", "messages"]
    template = {"input_template": "{text}", "output_template": "{output}"}
    assert choose(columns, **template).name == "template"
    found = [
        (chosen.name, chosen.why.partition(";")[0])
        for chosen in (choose(columns[:end]) for end in (7, 6, 5, 3, 1))
    ]
    assert found == [
        ("messages", "there is a column `messages`"),
        ("messages", "there is a column `conversations`"),
        ("prompt_completion", "there are columns `prompt` and `completion`"),
        ("template", "the columns fill the default templates"),
        ("text", "there is a column `text`"),
    ]


def test_messages_come_before_text_and_templates_before_both() -> None:
    assert choose(["messages", "text"]).name == "messages"
    assert choose(["text", "label"]).name == "text"
    assert choose(["messages", "text"], input_template="", output_template="{text}").name == "template"


def test_a_mapping_to_an_absent_column_is_refused_with_the_columns() -> None:
    with pytest.raises(DataError) as caught:
        choose(["instruction", "input", "output"], field_mapping={"instruction": "instructon"})
    assert (
        caught.value.message == "`field_mapping` names column `instructon`, absent from `rows.jsonl` (train)"
    )
    assert caught.value.hint == "the columns are `instruction`, `input`, `output`"


def test_an_unknown_placeholder_is_refused_with_the_columns() -> None:
    with pytest.raises(DataError, match=r"`input_template` has the placeholder `\{question\}`"):
        choose(["q", "output"], input_template="{question}")


@pytest.mark.parametrize("setting", ["input_template", "output_template"])
@pytest.mark.parametrize("spelling", ["{{q}}", "{{ q }}", "{{mapped}}"])
def test_a_column_in_doubled_braces_is_refused_with_the_right_spelling(setting: str, spelling: str) -> None:
    templates = {"input_template": "{q}", "output_template": "{a}", "field_mapping": {"mapped": "q"}}
    templates[setting] = f"### {spelling} {templates[setting]}"
    with pytest.raises(ConfigError, match=f"`{setting}` has") as caught:
        choose(["q", "a"], **templates)
    assert "single braces: write {" + spelling.strip("{ }") + "}" in str(caught.value.hint)


@pytest.mark.parametrize("braces", ["{{x}}", "{{{q}}}", "{{}}", '{{"q": 1}}'])
def test_other_braces_are_text(braces: str) -> None:
    assert choose(["q", "a"], input_template=braces + " {q}", output_template="{a}").name == "template"


def test_a_backslash_and_an_n_without_a_newline_are_warned_about() -> None:
    given = {"input_template": r"{text}\n", "output_template": "{text}\n"}
    (warning,) = choose(["text"], **given).warnings()
    assert r'input_template: "…\n"' in warning
    assert choose(["text"], **given).render({"text": "a"}, "row 1")["input"] == r"a\n"
    # LaTeX has backslashes beside newlines.
    assert choose(["text"], input_template="{text}\n\\nabla", output_template="{text}").warnings() == []


def test_an_output_template_without_a_placeholder_is_refused() -> None:
    with pytest.raises(ConfigError, match="`output_template` has no placeholder") as caught:
        choose(["q", "a"], input_template="{q}", output_template="the answer")
    assert "`q`, `a`" in str(caught.value.hint)


def test_an_input_template_without_a_placeholder_is_refused_unless_it_is_empty() -> None:
    for text in ("Question:\n", "{{content}}"):  # as another tool writes placeholders
        with pytest.raises(ConfigError, match="`input_template` has no placeholder"):
            choose(["text"], input_template=text, output_template="{text}")
    assert choose(["text"], input_template="", output_template="{text}").name == "template"


def test_jinja_is_told_from_a_column() -> None:
    for template in ("{% if q %}{q}{% endif %}", "{q|trim}"):
        with pytest.raises(DataError, match="no such column") as caught:
            choose(["q", "a"], input_template=template, output_template="{a}")
        assert "no Jinja" in str(caught.value.hint)


def test_columns_that_fit_no_format_are_refused() -> None:
    with pytest.raises(DataError, match="no way to read") as caught:
        choose(["question", "answer"])
    assert "`question`, `answer`" in str(caught.value.hint)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"x"])
def test_a_value_that_is_not_text_is_refused_with_its_row(value: Any) -> None:
    with pytest.raises(DataError, match="column `text` of row 7"):
        choose(["text"]).render({"text": value}, "row 7")


def test_a_row_without_a_column_of_the_others_is_refused() -> None:
    with pytest.raises(DataError, match="row 7 has no column `text`"):
        choose(["text"]).render({"txt": "a"}, "row 7")


@pytest.mark.parametrize("messages", [None, [], "hello", ["hello"], [{"content": "a"}], [{"role": "user"}],
                                      [{"role": "user", "content": ["a"]}]])  # fmt: skip
def test_malformed_messages_are_refused_with_their_row(messages: Any) -> None:
    with pytest.raises(DataError, match="row 7"):
        choose(["messages"]).render({"messages": messages}, "row 7")


def test_messages_keep_tools_and_lose_empty_keys() -> None:
    row = {
        "messages": [{"role": "user", "content": "a", "tool_calls": None}],
        "tools": '[{"name": "f"}]',
        "id": 3,
    }
    assert choose(["messages"]).render(row, "row 1") == {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"name": "f"}],
    }


# Labels of templates and plain text.


def byte_ends(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """Return where each token ends in the text's UTF-8 bytes, from the tokens' own spelling."""
    ends, end = [], 0
    spaces = tokenizer.bos_token == "<s>"
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in tokenizer.all_special_tokens:
            size = 0
        elif spaces:
            size = 1 if token.startswith("<0x") else len(token.replace("▁", " ").encode())
        else:
            size = len(token)
        end += size
        ends.append(end)
    # The space that Llama's tokenizer puts before the text is not of the text.
    return [max(0, end - 1) for end in ends] if spaces else ends


@pytest.mark.parametrize("kind", ["byte_bpe", "llama2", "chatml", "qwen3"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=TEXT, completion=TEXT.filter(bool))
def test_a_token_is_trained_exactly_if_it_ends_after_the_prompt(
    kind: str, prompt: str, completion: str
) -> None:
    tokenizer = build_tokenizer(kind)
    example = encode(kind, prompt, completion)
    assert example.input_ids[:-1] == tokenizer(prompt + completion)["input_ids"]
    assert (example.input_ids[-1], example.trained[-1]) == (tokenizer.eos_token_id, True)
    ends = byte_ends(tokenizer, example.input_ids[:-1])
    # Without a prompt even the space before the text is trained.
    expected = [end > len(prompt.encode()) or not prompt for end in ends]
    assert example.trained[1:-1] == expected[1:]
    assert not example.trained[0]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=ASCII, completion=ASCII.filter(lambda text: text.strip()))
def test_the_trained_tokens_spell_the_completion(kind: str, prompt: str, completion: str) -> None:
    tokenizer = build_tokenizer(kind)
    example = encode(kind, prompt + ": ", completion)
    spelt = trained_text(tokenizer, example).removesuffix(tokenizer.eos_token)

    def fold(text: str) -> str:
        return "".join(unicodedata.normalize("NFKC", text).lower().split())

    assert fold(spelt) == fold(completion)
    assert example.trained == sorted(example.trained)
    assert example.input_ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_every_token_of_plain_text_is_trained_but_the_first_which_nothing_precedes(kind: str) -> None:
    example = encode(kind, "", "The quick brown fox. Größe 你好 👋🏽\n")
    assert not example.trained[0]
    assert all(example.trained[1:])
    assert example.input_ids[-1] == build_tokenizer(kind).eos_token_id


def test_white_space_at_the_start_of_a_completion_is_trained() -> None:
    example = encode("byte_bpe", "def f():", "\n    return")
    assert trained_text(build_tokenizer("byte_bpe"), example) == "\n    return<|endoftext|>"


def test_an_end_token_that_is_there_already_is_not_doubled() -> None:
    for kind in ("byte_bpe", "llama2", "unigram", "wordpiece"):
        tokenizer = build_tokenizer(kind)
        example = encode(kind, "a b ", "c" + tokenizer.eos_token)
        ends = [i for i, token in enumerate(example.input_ids) if token == tokenizer.eos_token_id]
        assert ends[-1] == len(example.input_ids) - 1
        assert len(ends) == 1
        assert all(example.trained[i] for i in ends)


def test_an_end_token_in_the_prompt_is_not_trained() -> None:
    example = encode("byte_bpe", "a<|endoftext|>", "b")
    assert example.trained == [False, False, True, True]


def test_an_end_token_in_the_prompt_is_not_trained_when_the_completion_leaves_no_token() -> None:
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer("wordpiece")))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    (example,) = encode_as("template", tokenizer, {"input": "so [SEP]", "output": " "})
    assert tokenizer.convert_ids_to_tokens(example.input_ids)[-2:] == ["[SEP]", "[SEP]"]
    assert example.trained[-2:] == [False, True]


def test_an_empty_completion_makes_no_example() -> None:
    assert encode_as("template", build_tokenizer("byte_bpe"), {"input": "a", "output": ""}) == []


@pytest.mark.parametrize("nothing", [None, "", float("nan")])
def test_a_row_without_an_answer_has_no_completion_whatever_the_template_adds(nothing: Any) -> None:
    chosen = choose(["instruction", "output"])
    assert chosen.render({"instruction": "Capital of Chad?", "output": nothing}, "row 1")["output"] == ""


def test_an_earlier_truncated_call_leaves_no_trace() -> None:
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer("byte_bpe")))
    tokenizer("a b c d e f g h", truncation=True, max_length=2, padding="max_length")
    (example,) = encode_as("template", tokenizer, {"input": "", "output": "The quick brown fox jumps"})
    assert example == encode("byte_bpe", "", "The quick brown fox jumps")


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer("byte_bpe")))
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        format_named("text", HFDatasetConfig()).with_tokenizer(tokenizer, DATE)


# Labels of conversations.

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_every_assistant_turn_of_a_conversation_is_trained_to_its_end_token() -> None:
    tokenizer = build_tokenizer("chatml")
    row = chat((SYSTEM, "Be kind."), (USER, "Hi"), (ASSISTANT, "Hello, 世界!"), (USER, "Bye"), (ASSISTANT, "So long"),
               (USER, "Wait"))  # fmt: skip
    (example,) = encode_as("messages", tokenizer, row)
    assert spell(tokenizer, example) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello, 世界!<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n⟦So long<|im_end|>⟧"
    )


def test_a_template_that_renders_the_last_turn_otherwise_makes_an_example_of_each_turn() -> None:
    tokenizer = build_tokenizer("qwen3")
    row = chat((USER, "Hi"), (ASSISTANT, "Hello"), (USER, "Bye"), (ASSISTANT, "So long"))
    first, second = encode_as("messages", tokenizer, row)
    assert spell(tokenizer, first) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello<|im_end|>⟧"
    )
    assert spell(tokenizer, second) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSo long<|im_end|>⟧"
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=6), st.sampled_from(["chatml", "qwen3"]))
def test_a_turn_is_seen_as_inference_would_see_it(contents: list[str], kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    row = chat(*((ASSISTANT if i % 2 else USER, content) for i, content in enumerate(contents)))
    examples = encode_as("messages", tokenizer, row)
    for example in examples:
        starts = [
            i for i in range(1, len(example.trained)) if example.trained[i] and not example.trained[i - 1]
        ]
        for start in starts:
            seen = tokenizer.decode(example.input_ids[:start])
            prompts = [
                tokenizer.apply_chat_template(
                    row["messages"][:turn], add_generation_prompt=True, tokenize=False
                )
                for turn in range(1, len(contents), 2)
            ]
            assert seen in prompts


def test_a_turn_without_an_end_token_gets_one() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = with_template(template)
    row = chat((USER, "Hi"), (ASSISTANT, "Hello"), (USER, "Bye"), (ASSISTANT, "So long"))
    first, second = encode_as("messages", tokenizer, row)
    assert spell(tokenizer, first) == "user: Hi\nassistant: ⟦Hello\n<|im_end|>⟧"
    assert spell(tokenizer, second).endswith("assistant: ⟦So long\n<|im_end|>⟧")


THINKING_PROMPT = CHATML_TEMPLATE.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif")


def test_a_generation_prompt_that_opens_a_block_leaves_the_content_trained() -> None:
    tokenizer = with_template(THINKING_PROMPT)
    (example,) = encode_as("messages", tokenizer, chat((USER, "Hi"), (ASSISTANT, "<b>Hello</b>")))
    assert spell(tokenizer, example).endswith("<|im_start|>assistant\n⟦<b>Hello</b><|im_end|>⟧")


def test_a_template_that_cannot_be_trained_faithfully_is_refused() -> None:
    template = THINKING_PROMPT.replace("message['content']", "message['content'] | upper")
    with pytest.raises(RowError, match="can't be trained faithfully"):
        encode_as("messages", with_template(template), chat((USER, "Hi"), (ASSISTANT, "Hello")))


@pytest.mark.parametrize("turns", [[(USER, "Hi")], [(ASSISTANT, "Hello")], [(USER, "Hi"), (ASSISTANT, "")]])
def test_a_conversation_without_an_answer_makes_no_example(turns: list[tuple[str, str]]) -> None:
    assert encode_as("messages", build_tokenizer("chatml"), chat(*turns)) == []


def test_a_role_that_the_template_refuses_is_an_error_of_that_row() -> None:
    rows = [chat((USER, "Hi"), (ASSISTANT, "Hello")), chat(("critic", "Hi"), (ASSISTANT, "Hello"))]
    with pytest.raises(RowError, match="unknown role critic") as caught:
        format_named("messages", HFDatasetConfig()).with_tokenizer(build_tokenizer("qwen3"), DATE).encode(
            rows, Findings()
        )
    assert caught.value.index == 1


def test_conversations_without_a_chat_template_are_refused() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        format_named("messages", HFDatasetConfig()).with_tokenizer(build_tokenizer("byte_bpe"), DATE)

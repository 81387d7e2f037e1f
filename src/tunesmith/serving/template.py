"""The chat template by which a server asks as a run's rows were trained."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from tunesmith.data.asking import ConversationQuestions, Message, Questions, TemplateQuestions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LAST_QUESTION = (
    "{%- set last = namespace(text=none) %}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{%- set last.text = message['content'] %}{%- endif %}{%- endfor %}"
    "{%- if last.text is none %}{{- raise_exception('a user message is what fills the template') }}{%- endif %}"
)


def chat_template_of(questions: Questions, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return a chat template that makes the prompts of `questions`; None where there is none to make.

    A run's own input template is filled with the last user message, the first placeholder of several; what was said
    before isn't part of it, as it was of no row.
    """
    if isinstance(questions, ConversationQuestions):
        return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    if not isinstance(questions, TemplateQuestions):
        return None
    first, pieces = questions.fields[0], questions.pieces()
    begin = _added_text(tokenizer)
    if begin and pieces[0][0].startswith(begin):
        begin = ""
    shown = [repr(begin)] if begin else []
    shown += ["last.text" if name == first else repr(literal) for literal, name in pieces]
    return f"{_LAST_QUESTION}{{{{- {' ~ '.join(shown)} }}}}"


def asks_as_trained(
    questions: Questions, tokenizer: PreTrainedTokenizerFast, template: str, date: str
) -> bool:
    """Tell whether a server that applies this chat template sends a model the prompts that it was trained with.

    A server tokenizes the text of a prompt by itself, where training had the answer behind it. `date` (ISO) is the day
    that trained texts name.
    """
    said = dict.fromkeys(questions.fields[:1], "Why?")
    messages: list[Message] = [{"role": "user", "content": "Why?"}]
    if isinstance(questions, ConversationQuestions):
        messages = questions.messages(said, ())
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
        strftime_now=datetime.datetime.fromisoformat(date).strftime,
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = list(questions.prompt(said).input_ids)
    return bool(ids[: len(asked)] == asked and not tokenizer.decode(ids[len(asked) :]).strip())


def _added_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what the tokenizer puts before a text, as text: a server leaves that to the chat template."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    num_added = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return "".join(tokenizer.convert_ids_to_tokens(whole[:num_added]))

"""The chat's terminal: a line is a question, and so is a line of a pipe, whose answers go to stdout."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

from tunesmith.config import ChatConfig
from tunesmith.data.asking import Said
from tunesmith.errors import TunesmithError
from tunesmith.serving.chat import Answer, Chat, open_chat
from tunesmith.signals import ended_by_sigterm

logger = logging.getLogger(__name__)

RESET, EXIT = "/reset", "/exit"
_TOLD = {"length": "[cut off at --max_tokens or the model's last position]", "interrupted": "[stopped]"}


def run_chat(config: ChatConfig) -> None:
    """Answer the lines of stdin until it ends.

    Raises:
        ConfigError, DataError, ModelError, RunError: bad input; in a terminal a bad question is told and passed over.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with ended_by_sigterm(), open_chat(config) as chat:
        if is_terminal:
            logger.info("%s begins anew, %s or Ctrl-D leaves, Ctrl-C stops an answer", RESET, EXIT)
        for said in _read_terminal(chat) if is_terminal else _read_pipe(chat):
            try:
                _answer(chat, said, is_terminal)
            except TunesmithError as error:
                if not is_terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)


def _answer(chat: Chat, said: Said, is_terminal: bool) -> None:
    """Print what each speaker answers, the tuned model first; what it says is what is remembered."""
    prompt_ids = chat.prompt_ids(said)
    answers: list[Answer] = []
    for speaker in chat.speakers:
        if is_terminal or len(chat.speakers) > 1:
            print(f"{speaker.name}: ", end="", flush=True)
        answers.append(chat.ask(prompt_ids, speaker, lambda piece: print(piece, end="", flush=True)))
        print(flush=True)
        if told := _TOLD.get(answers[-1].ending):
            logger.info("%s", told)
        if answers[-1].ending == "interrupted" and not is_terminal:
            raise KeyboardInterrupt
    chat.remember(said, answers[0])


def _read_pipe(chat: Chat) -> Iterator[Said]:
    fields = chat.ready.questions.fields
    if len(fields) > 1:
        logger.info("a line fills `%s`; JSON such as %s fills the others too", fields[0], _example(fields))
    for line in sys.stdin:
        text = line.rstrip("\r\n")
        if text.strip() == EXIT:
            return
        if text.strip() == RESET:
            chat.reset()
        elif text.strip():
            yield read_said(text, fields)


def _read_terminal(chat: Chat) -> Iterator[Said]:
    import readline  # noqa: F401 - lets `input` edit the line and call up earlier ones

    fields = chat.ready.questions.fields
    while True:
        try:
            text = input("you: " if len(fields) == 1 else f"{fields[0]}: ")
            if text.strip() == EXIT:
                return
            if text.strip() == RESET:
                chat.reset()
            elif text.strip():
                said = read_said(text, fields)
                yield said if len(said) > 1 else {**said, **{name: input(f"{name}: ") for name in fields[1:]}}
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # of a line that is being written, nothing is kept
            print()


def read_said(line: str, fields: tuple[str, ...]) -> Said:
    """Return a question from its line: a JSON object of its fields, which may hold newlines, else the first of them."""
    if line.lstrip().startswith("{"):
        try:
            read = json.loads(line)
        except ValueError:
            read = {}
        if read and set(read) <= set(fields) and all(isinstance(value, str) for value in read.values()):
            return dict(read)
    return {fields[0]: line}


def _example(fields: tuple[str, ...]) -> str:
    return json.dumps(dict.fromkeys(fields, "…"), ensure_ascii=False)

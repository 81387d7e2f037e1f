"""A chat with a tuned model: prompts as trained, answers as evaluation finds them, piece by piece."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from support.exports import convert, tuned_of
from tunesmith.config import ChatConfig, EvaluateConfig
from tunesmith.errors import ConfigError, DataError, RunError
from tunesmith.evaluate.engines.base import Request
from tunesmith.evaluate.plan import make_plan
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import find_tuned
from tunesmith.serving.chat import Chat, open_chat
from tunesmith.serving.terminal import read_said, run_chat

ModelOf = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("alone")


def config_of(run: RunDir, **changes: Any) -> ChatConfig:
    return ChatConfig(**{"checkpoints_dir": str(run.path), "max_tokens": 8, **changes})


def asked(chat: Chat, text: str) -> list[str]:
    """Return what each speaker answers, and remember the tuned model's."""
    said = {chat.ready.questions.fields[0]: text}
    prompt_ids = chat.prompt_ids(said)
    answers = [chat.ask(prompt_ids, speaker, lambda piece: None) for speaker in chat.speakers]
    chat.remember(said, answers[0])
    return [answer.text for answer in answers]


def test_answers_and_prompts_are_those_of_an_evaluation(of_templates: RunDir, of_chats: RunDir) -> None:
    for run, column in ((of_templates, "input"), (of_chats, None)):
        settings = EvaluateConfig(checkpoints_dir=str(run.path), max_tokens=8, engine="transformers")
        tuned = find_tuned(settings)
        plan = make_plan(settings, tuned, use_gpu=False)
        with open_chat(config_of(run, compare="base")) as chat:
            assert set(chat.ready.stop_token_ids) == set(plan.stop_token_ids)
            for number, prompt in plan.test_set.samples.items():
                chat.reset()
                question = prompt.text.rstrip() if column else prompt.text.split("<|im_sep|>")[2]
                question = question.partition("<|im_end|>")[0]
                said = {chat.ready.questions.fields[0]: question}
                assert chat.prompt_ids(said) == prompt.input_ids
                found = asked(chat, question)
                for speaker, text in zip(chat.speakers, found, strict=True):
                    request = Request(number, speaker.name, prompt.input_ids)
                    ((generation,),) = speaker.engine.generate([request])
                    assert text == chat.ready.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
                assert found[0] != found[1]


def test_a_conversation_goes_on_and_can_be_begun_anew(of_chats: RunDir) -> None:
    with open_chat(config_of(of_chats)) as chat:
        first = chat.prompt_ids({"user": "1 plus 2?"})
        (answer,) = asked(chat, "1 plus 2?")
        second = chat.prompt_ids({"user": "And 3?"})
        text = chat.ready.tokenizer.decode(second)
        assert "Add.<|im_end|>" in text and f"{answer.strip()}<|im_end|>" in text
        assert second[: len(first)] == first
        chat.reset()
        assert chat.prompt_ids({"user": "1 plus 2?"}) == first


def test_rows_of_templates_know_no_earlier_questions(of_templates: RunDir) -> None:
    with open_chat(config_of(of_templates)) as chat:
        first = chat.prompt_ids({"instruction": "1 plus 2?"})
        asked(chat, "4 plus 5?")
        assert chat.prompt_ids({"instruction": "1 plus 2?"}) == first


def test_the_export_is_asked_as_its_run_was_trained(
    of_chats: RunDir, of_templates: RunDir, tmp_path: Path
) -> None:
    for run, field in ((of_chats, "user"), (of_templates, "instruction")):
        export = convert(tuned_of(run), tmp_path / field / "elsewhere")
        with (
            open_chat(config_of(run)) as chat,
            open_chat(ChatConfig(checkpoints_dir=str(export), max_tokens=8)) as other,
        ):
            assert other.prompt_ids({field: "1 plus 2?"}) == chat.prompt_ids({field: "1 plus 2?"})
            assert set(chat.ready.questions.end_tokens) <= set(other.ready.stop_token_ids)


def test_a_whole_model_answers_beside_its_base(of_whole: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shutil.rmtree(of_whole.path / "serving", ignore_errors=True)
    for _ in range(2):
        with open_chat(config_of(of_whole, compare="base")) as chat:
            tuned, base = asked(chat, "1 plus 2?")
            assert tuned != base
    assert caplog.text.count("exporting checkpoint_00000012") == 1
    assert "which an earlier call has exported" in caplog.text


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(of_chats: RunDir) -> None:
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with open_chat(config_of(of_chats, max_tokens=30)) as chat:
        prompt_ids = chat.prompt_ids({"user": "1 plus 2?"})
        answer = chat.ask(prompt_ids, chat.speakers[0], interrupt)
        assert answer.ending == "interrupted" and answer.text
        chat.remember({"user": "1 plus 2?"}, answer)
        assert chat.before[0].answer == answer.text


def test_a_prompt_beyond_the_models_positions_is_refused(of_chats: RunDir) -> None:
    with open_chat(config_of(of_chats)) as chat:
        with pytest.raises(DataError, match="room for 512") as error:
            chat.prompt_ids({"user": "word " * 600})
        assert error.value.hint == "ask with less"
        asked(chat, "Hi")
        with pytest.raises(DataError) as error:
            chat.prompt_ids({"user": "word " * 600})
        assert "/reset" in str(error.value.hint)


def talk(
    config: ChatConfig, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Return what a chat prints whose stdin is a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    run_chat(config)
    return capsys.readouterr().out


def test_a_pipe_is_answered_line_by_line(
    of_chats: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(of_chats)
    with open_chat(config) as chat:
        expected = [asked(chat, text)[0] for text in ("1 plus 2?", "And 3?")]
    found = talk(config, "1 plus 2?\n\nAnd 3?\n/reset\n1 plus 2?\n/exit\nNever asked\n", monkeypatch, capsys)
    assert found == "".join(f"{text}\n" for text in [*expected, expected[0]])
    beside = talk(config_of(of_chats, compare="base"), "1 plus 2?\n", monkeypatch, capsys)
    assert beside.startswith(f"tuned: {expected[0]}\nbase: ")


def test_what_has_no_base_is_not_compared(model_of: ModelOf) -> None:
    config = ChatConfig(checkpoints_dir=str(model_of("llama")), compare="base")
    with pytest.raises(ConfigError, match=r"the base model of .* isn't known"), open_chat(config):
        pass


def test_without_a_name_the_newest_run_is_taken(of_chats: RunDir, tmp_path: Path) -> None:
    with open_chat(ChatConfig(home=of_chats.home)) as chat:
        assert chat.ready.tuned.run == of_chats
    with pytest.raises(RunError, match="there is no run"), open_chat(ChatConfig(home=tmp_path)):
        pass


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Why?", {"a": "Why?"}),
        ('{"a": "x\\ny", "b": "z"}', {"a": "x\ny", "b": "z"}),
        ('{"b": "z"}', {"b": "z"}),
        ('{"c": "z"}', {"a": '{"c": "z"}'}),
        ('{"a": 1}', {"a": '{"a": 1}'}),
        ("{what}", {"a": "{what}"}),
        ("{}", {"a": "{}"}),
    ],
)
def test_a_line_may_name_its_fields(line: str, said: dict[str, str]) -> None:
    assert read_said(line, ("a", "b")) == said


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(of_chats: RunDir) -> None:
    words = ["-m", "tunesmith", "chat", str(of_chats.path), "--max_tokens", "400", "--compare", "base"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    child = pexpect.spawn(
        sys.executable, words, env=environ, timeout=120, encoding="utf-8", dimensions=(24, 200)
    )
    child.expect("Ctrl-D leaves")
    child.expect("you: ")
    child.sendline("1 plus 2?")
    child.expect("tuned: .")
    child.expect("base: ....")
    child.sendintr()
    child.expect(r"\[stopped\]")
    child.expect("you: ")
    child.sendintr()
    child.expect("you: ")
    child.sendline("/reset")
    child.expect("you: ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0

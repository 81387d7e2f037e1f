"""The command: verbs, help, messages and exit codes, and that nothing heavy is imported to answer."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

import tunesmith
from support.paths import REPOSITORY
from tunesmith import cli
from tunesmith.config import TrainConfig
from tunesmith.config.reference import format_markdown, json_schema
from tunesmith.errors import CheckpointError, DataError, TrainingError
from tunesmith.logs import configure_logging
from tunesmith.options import Verb
from tunesmith.verbs import VERBS

HEAVY = ("torch", "transformers", "ray", "datasets", "peft", "numpy", "pandas", "rich", "wandb", "matplotlib")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tunesmith", *words]


def environment() -> dict[str, str]:
    """The user's environment, without settings, and with stdout buffered as it is for users."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TUNESMITH_") and name != "PYTHONUNBUFFERED"
    }
    return {**environ, "PYTHONPATH": str(REPOSITORY / "src")}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Return the message and the hint of a command that ends with exit code 2."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error, blank, hint = err.rstrip("\n").rsplit("\n", 2)
    assert blank == ""
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def set_verb(monkeypatch: pytest.MonkeyPatch, run: Callable[[Verb, list[str]], int]) -> None:
    monkeypatch.setitem(VERBS, "try", Verb("try", "a verb of the test's own", run))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["convert", "-h"],
        ["chat", "-h"],
        ["serve", "--help"],
        ["submit", "--help"],
        ["render", "-h"],
        ["schema", "train"],
    ],
)
def test_nothing_heavy_is_imported_to_answer(words: list[str]) -> None:
    code = (
        "import sys; from tunesmith.cli import main; code = main(sys.argv[1:]);"
        f"print(code, sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment(), capture_output=True, text=True, check=False
    )
    assert run.stderr == "0 []\n"
    assert run.stdout


def test_bad_settings_are_refused_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from tunesmith.cli import main; code = main(['train', '--max_steps', '0']);"
        f"print(code, sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert run.stdout == "2 []\n"
    assert "Traceback" not in run.stderr


def test_a_mistaken_path_is_refused_before_torch_or_ray_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from tunesmith.cli import main;"
        "code = main(['train', '--model_path=.', '--dataset_name=nowhere.jsonl', f'--home={sys.argv[1]}']);"
        "print(code, sorted(set(('torch', 'transformers', 'ray')) & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "2 []\n"
    assert "nowhere.jsonl" in run.stderr


def test_help_answers_in_well_under_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command("train", "--help"), env=environment(), capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0


def test_the_bare_command_prints_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    short = capsys.readouterr().out
    for verb in (
        "train [run.yaml] [flags]",
        "evaluate [RUN] [flags]",
        "convert [RUN] [flags]",
        "chat [RUN] [flags]",
        "serve [RUN] [MORE…] [flags] [-- flags of vLLM]",
        "watch RUN [--once]",
    ):
        assert f"tunesmith {verb}" in short
    assert len(short.splitlines()) < 17
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == short


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: tunesmith {verb}")
    assert cli.main([verb, "-h"]) == 0
    assert capsys.readouterr().out == out


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tunesmith {tunesmith.__version__}\n"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tunesmith.__version__ == project["version"]


def test_the_package_offers_its_names_lazily() -> None:
    assert tunesmith.TrainConfig is TrainConfig
    with pytest.raises(AttributeError, match="fine_tun"):
        _ = tunesmith.fine_tun  # type: ignore[attr-defined]


def test_schema_prints_json_or_the_reference_page(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train"], ["train", "--format", "json"], ["--format=json", "train"]):
        assert cli.main(["schema", *words]) == 0
        assert json.loads(capsys.readouterr().out) == json_schema(TrainConfig)
    assert cli.main(["schema", "train", "--format", "markdown"]) == 0
    assert capsys.readouterr().out == format_markdown(TrainConfig, "train")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["trian"], "unknown verb `trian`", "did you mean `tunesmith train`?"),
        (
            ["zzz"],
            "unknown verb `zzz`",
            "the verbs are train, evaluate, convert, chat, serve, inspect, plan, watch, submit, render, schema",
        ),
        (["run.yaml"], "`run.yaml` stands before the verb", "write `tunesmith train run.yaml`"),
        (
            ["--max_steps", "5"],
            "`--max_steps` stands before the verb",
            "write `tunesmith train --max_steps 5`",
        ),
        (["train", "--max_step", "5"], "unknown flag `--max_step`", "did you mean `--max_steps`?"),
        (["inspect", "--max_step", "5"], "unknown flag `--max_step`", "did you mean `--max_steps`?"),
        (["watch"], "`tunesmith watch` needs `RUN`", "write `tunesmith watch RUN [--once]`"),
        (["watch", "a", "b"], "`tunesmith watch` doesn't take `b`", "write `tunesmith watch RUN [--once]`"),
        (["watch", "a", "--onec"], "unknown flag `--onec`", "did you mean `--once`?"),
        (
            ["schema", "trian"],
            "there is no schema `trian`",
            "there are those of train, evaluate, convert, chat, serve",
        ),
        (["schema", "train", "--format", "xml"], "`--format` is `xml`", "it must be json or markdown"),
        (["schema", "train", "--format"], "`--format` has no value", "write `--format json|markdown`"),
        (["watch", "a", "--once=1"], "`--once` takes no value", "write `--once` alone"),
        (["submit", "--relaese", "a"], "unknown flag `--relaese`", "`--help` lists the flags"),
    ],
)
def test_bad_words_are_refused_with_a_hint(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *words) == (message, hint)


@pytest.mark.parametrize("verb", ["train", "inspect"])
def test_settings_reach_the_verbs_from_yaml_environment_and_flags(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 0")
    monkeypatch.setenv("TUNESMITH_LORA_RANK", "0")
    message, _ = refused(capsys, verb, "--use_wandb", str(path), "--seed=-1")
    assert f"`{path}: max_steps` is `0`" in message
    assert "`TUNESMITH_LORA_RANK` is `0`" in message
    assert "`--seed` is `-1`" in message


def test_watch_shows_a_run_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "results" / "tiny" / "ray_results" / "TorchTrainer_first"
    run.mkdir(parents=True)
    lines = [
        {"format_version": 1},
        {"step": 0, "attempt": 1, "event": "start", "message": "", "time": 1.0},
        {"step": 0, "attempt": 1, "eval_loss": 2.5, "time": 2.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["watch", str(run), "--once"]) == 0
    assert "2.5" in capsys.readouterr().out


def test_watch_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message, _ = refused(capsys, "watch", str(tmp_path), "--once")
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("bad", "do"), 2), (CheckpointError("bad", "do"), 1), (TrainingError("bad"), 1)],
)
def test_errors_end_with_message_hint_and_their_exit_code(
    error: DataError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(verb: Verb, words: list[str]) -> NoReturn:
        raise error

    set_verb(monkeypatch, fail)
    assert cli.main(["try"]) == code
    assert capsys.readouterr().err == ("error: bad\n\nhint: do\n" if error.hint else "error: bad\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), BrokenPipeError("of a socket")])
def test_any_other_exception_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(verb: Verb, words: list[str]) -> NoReturn:
        raise error

    set_verb(monkeypatch, fail)
    with pytest.raises(type(error)):
        cli.main(["try"])


def test_an_interrupt_ends_quietly_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(verb: Verb, words: list[str]) -> NoReturn:
        raise KeyboardInterrupt

    set_verb(monkeypatch, interrupt)
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [[], ["train", "--help"], ["schema", "train"]])
def test_a_reader_that_leaves_ends_the_command_quietly(words: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    run = subprocess.run(
        command(*words), env=environment(), stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (run.returncode, run.stderr) == (141, b"")


def test_logs_go_to_stderr_from_info_up_for_us_and_warning_up_for_others() -> None:
    code = (
        "import logging; from tunesmith.logs import configure_logging; configure_logging(); configure_logging();"
        "logging.getLogger('tunesmith.train.loop').info('ours');"
        "logging.getLogger('ray').info('theirs'); logging.getLogger('transformers').warning('theirs');"
        "logging.getLogger('other').warning('a warning')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == ("", "ours\na warning\n")


def test_logging_that_a_program_has_configured_is_kept() -> None:
    handlers = list(logging.getLogger().handlers)
    configure_logging()
    assert logging.getLogger().handlers == handlers

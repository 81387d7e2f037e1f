"""The command `tunesmith`: reads words, calls the verb, turns errors into messages and exit codes."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tunesmith.errors import ConfigError, TunesmithError

if TYPE_CHECKING:
    from tunesmith.config import Settings

Model = TypeVar("Model", bound="Settings")

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


@dataclass(frozen=True)
class Verb:
    """One verb: `run` takes the words after it."""

    usage: str
    summary: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's by default) and return the exit code.

    0: done. 1: a failure at work. 2: bad input. 130: interrupted. 141: the reader of stdout is gone.
    """
    try:
        exit_code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except TunesmithError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # A socket's is a failure; only `tunesmith … | head` ends quietly.
        if not _stdout_is_broken():
            raise
        return BROKEN_PIPE
    return exit_code


def configure_logging() -> None:
    """Log to stderr: our own events from INFO up, other libraries' from WARNING up.

    A program that has configured logging keeps its own handlers.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("tunesmith").setLevel(logging.INFO)
    for name in ("transformers", "datasets", "peft", "filelock", "fsspec", "urllib3", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers and datasets set their own loggers' levels when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_short_help(), end="")
    elif words[0] == "--version":
        from tunesmith import __version__

        print(f"tunesmith {__version__}")
    elif words[0] in _VERBS:
        return _VERBS[words[0]].run(words[1:])
    else:
        raise _unknown_verb(words)
    return 0


def _train(words: list[str]) -> int:
    from tunesmith.config import TrainConfig

    config = _read_config("train", TrainConfig, words)
    if config is None:
        return 0
    from rich.console import Console

    from tunesmith.cluster.ray_train import fine_tune
    from tunesmith.view.summary import format_summary

    result = fine_tune(config)
    next_steps = []
    if result.ending == "stopped":
        next_steps = [("go on with", _same_command(["train", *words]))]
    Console().print(format_summary(result.run, next_steps), soft_wrap=True)
    return result.exit_code


def _evaluate(words: list[str]) -> int:
    from tunesmith.config import EvaluateConfig

    config = _read_config("evaluate", EvaluateConfig, words)
    if config is None:
        return 0
    from rich.console import Console

    from tunesmith.cluster.ray_eval import evaluate
    from tunesmith.evaluate.table import format_scores

    result = evaluate(config)
    Console().print(format_scores(result.scores), soft_wrap=True)
    print(f"report: {result.folder / 'report.html'}")
    return 0


def _convert(words: list[str]) -> int:
    from tunesmith.config import ConvertConfig

    config = _read_config("convert", ConvertConfig, words)
    if config is None:
        return 0
    from tunesmith.export.convert import convert

    print(convert(config).describe())
    return 0


def _same_command(words: list[str]) -> str:
    """Return a line that runs this program with `words` again, from the same folder and any shell."""
    program = Path(sys.argv[0])
    start = [os.path.relpath(program)] if program.name == "tunesmith" else [sys.executable, "-m", "tunesmith"]
    if shutil.which("tunesmith") == str(program.absolute()):
        start = ["tunesmith"]
    settings = [f"{k}={shlex.quote(v)}" for k, v in os.environ.items() if k.startswith("TUNESMITH_")]
    return " ".join([*settings, shlex.join([*start, *words])])


def _inspect(words: list[str]) -> int:
    from tunesmith.config import TrainConfig

    config = _read_config("inspect", TrainConfig, words)
    if config is not None:
        from tunesmith.view.inspect import inspect

        inspect(config)
    return 0


def _read_config(verb: str, model: type[Model], words: list[str]) -> Model | None:
    """Return the settings of a verb, or None where help was asked for and printed."""
    from tunesmith.config import TunedModelConfig
    from tunesmith.settings import format_help, load_settings, parse_flags

    if _asks_help(words):
        print(format_help(model, _describe_verb(verb)), end="")
        return None
    flags = parse_flags(model, words, "checkpoints_dir" if issubclass(model, TunedModelConfig) else None)
    config = load_settings(model, flags.yaml_path, flags.values, os.environ)
    configure_logging()
    return config


def _watch(words: list[str]) -> int:
    if _asks_help(words):
        print(f"{_describe_verb('watch')}\n\n  --once    print the run's state and end")
        return 0
    (run,), options = _read_words("watch", words, ["RUN"], {"--once"})
    configure_logging()
    from tunesmith.view.watch import watch

    watch(run, once="--once" in options)
    return 0


def _schema(words: list[str]) -> int:
    from tunesmith.config import ConvertConfig, EvaluateConfig, TrainConfig
    from tunesmith.settings import format_markdown, json_schema

    if _asks_help(words):
        print(
            f"{_describe_verb('schema')}\n\n  --format json|markdown    JSON schema (default) or reference page"
        )
        return 0
    output_format, words = _take_format(words)
    (verb,), _ = _read_words("schema", words, ["VERB"], set())
    models: dict[str, type[Settings]] = {
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "convert": ConvertConfig,
    }
    if verb not in models:
        raise ConfigError(f"there is no schema `{verb}`", f"there are those of {', '.join(models)}")
    if output_format == "json":
        print(json.dumps(json_schema(models[verb]), indent=2, ensure_ascii=False))
    else:
        print(format_markdown(models[verb], verb), end="")
    return 0


_VERBS = {
    "train": Verb("train [run.yaml] [flags]", "fine-tune a model; the same command again resumes it", _train),
    "evaluate": Verb(
        "evaluate [RUN] [flags]", "score a tuned model beside its base model; a report page", _evaluate
    ),
    "convert": Verb(
        "convert [RUN] [flags]", "export a tuned model as a Hugging Face folder, proven equal", _convert
    ),
    "inspect": Verb("inspect [run.yaml] [flags]", "show the examples a run would train on", _inspect),
    "watch": Verb("watch RUN [--once]", "draw a run's progress from its folder", _watch),
    "schema": Verb(
        "schema VERB [--format json|markdown]", "print the settings' schema or reference page", _schema
    ),
}


def _asks_help(words: list[str]) -> bool:
    return "--help" in words or "-h" in words


def _take_format(words: list[str]) -> tuple[str, list[str]]:
    """Return the value of `--format` and the other words."""
    rest: list[str] = []
    output_format = "json"
    remaining = iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        if option != "--format":
            rest.append(word)
            continue
        output_format = value if equals else next(remaining, "")
        if output_format not in ("json", "markdown"):
            raise ConfigError(f"`--format` is `{output_format}`", "it must be json or markdown")
    return output_format, rest


def _read_words(
    verb: str, words: list[str], wanted: list[str], options: set[str]
) -> tuple[list[str], set[str]]:
    """Return as many plain words as are `wanted` (their names), and which of `options` are given."""
    plain = [word for word in words if not word.startswith("-")]
    given = {word for word in words if word.startswith("-")}
    usage = f"write `tunesmith {_VERBS[verb].usage}`"
    for option in sorted(given - options):
        raise ConfigError(f"unknown flag `{option}`", _did_you_mean(option, options) or usage)
    if len(plain) < len(wanted):
        raise ConfigError(f"`tunesmith {verb}` needs `{wanted[len(plain)]}`", usage)
    if len(plain) > len(wanted):
        raise ConfigError(f"`tunesmith {verb}` doesn't take `{plain[len(wanted)]}`", usage)
    return plain, given


def _unknown_verb(words: list[str]) -> ConfigError:
    word = words[0]
    rest = " ".join(words)
    if word.startswith("-") or word.endswith((".yaml", ".yml")):
        return ConfigError(f"`{word}` stands before the verb", f"write `tunesmith train {rest}`")
    hint = _did_you_mean(word, _VERBS, "tunesmith ")
    return ConfigError(f"unknown verb `{word}`", hint or f"the verbs are {', '.join(_VERBS)}")


def _did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str | None:
    from tunesmith.settings.fields import nearest_name

    near = nearest_name(word, names)
    return f"did you mean `{prefix}{near}`?" if near else None


def _describe_verb(verb: str) -> str:
    summary = _VERBS[verb].summary
    return f"usage: tunesmith {_VERBS[verb].usage}\n\n{summary[0].upper()}{summary[1:]}."


def _short_help() -> str:
    width = max(len(verb.usage) for verb in _VERBS.values())
    lines = ["Fine-tune any Hugging Face causal language model on Ray.", ""]
    lines += [f"  tunesmith {verb.usage.ljust(width)}  {verb.summary}" for verb in _VERBS.values()]
    lines += ["", "`tunesmith train --help` lists the settings; `tunesmith --version` prints the version."]
    return "\n".join(lines) + "\n"


def _print_error(error: TunesmithError) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint is not None:
        print(f"\nhint: {error.hint}", file=sys.stderr)


def _stdout_is_broken() -> bool:
    """Return whether stdout's reader is gone, and if so silence the interpreter's last flush."""
    import select

    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    broken = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return broken

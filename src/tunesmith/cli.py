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

from tunesmith.errors import ConfigError, ResourceError, TunesmithError
from tunesmith.options import Option, format_options, take_options

if TYPE_CHECKING:
    from tunesmith.chart.release import Release
    from tunesmith.config import Settings

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="Settings")

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


@dataclass(frozen=True)
class Verb:
    """One verb: `run` takes the words after it."""

    usage: str
    summary: str
    run: Callable[[list[str]], int]
    options: tuple[Option, ...] = ()


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

    from tunesmith.api import fine_tune
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

    from tunesmith.api import evaluate
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
    from tunesmith.api import convert

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


def _plan(words: list[str]) -> int:
    from tunesmith.config import TrainConfig

    given, words = _take_options("plan", words)
    config = _read_config("plan", TrainConfig, words)
    if config is None:
        return 0
    from tunesmith.cluster.resources import allocate, this_machine
    from tunesmith.view.plan import find_workers, imagine_workers, plan

    if "--gpu" in given:
        workers = imagine_workers(config, given["--gpu"][-1])
    else:
        try:
            allocation = allocate(config, [this_machine()], "this machine")
        except ResourceError as error:
            raise ResourceError(error.message, "name the GPUs to plan for: --gpu A100-80GB") from error
        workers = find_workers(config, allocation.num_workers, allocation.use_gpu)
    return 0 if plan(config, workers) else 1


def _render(words: list[str]) -> int:
    given, words = _take_options("render", words)
    release = _read_release("render", given, words)
    if release is not None:
        from tunesmith.chart.release import render

        print(render(release), end="")
    return 0


def _submit(words: list[str]) -> int:
    given, words = _take_options("submit", words)
    release = _read_release("submit", given, words)
    if release is None:
        return 0
    from tunesmith.cluster.ray_job import address_variable

    if address_variable() is None:
        if "--wait" in given:
            raise ConfigError(
                "`--wait` is for Ray jobs", "leave it out: Helm prints how to follow the training"
            )
        from tunesmith.chart.release import submit

        print(submit(release), end="")
        return 0
    return _submit_to_ray(release, wait="--wait" in given)


def _submit_to_ray(release: Release, wait: bool) -> int:
    from tunesmith.chart.places import refuse_relative_paths
    from tunesmith.cluster.ray_job import address_variable, submit_ray_job

    if release.values or release.assignments or release.namespace:
        logger.info(
            "a Ray job, as %s is set: what describes pods and their namespace isn't used", address_variable()
        )
    refuse_relative_paths(release.config, own_home=False)
    job = submit_ray_job(release.config, release.name)
    print(job.describe(), flush=True)
    return job.wait() if wait else 0


def _read_release(verb: str, given: dict[str, list[str]], words: list[str]) -> Release | None:
    """Return the release that the options and settings of a verb describe, or None where help was printed."""
    from tunesmith.config import TrainConfig
    from tunesmith.config.flags import parse_flags

    config = _read_config(verb, TrainConfig, words)
    if config is None:
        return None
    from tunesmith.chart.release import Release, choose_name

    path = parse_flags(TrainConfig, words).yaml_path
    last = {option: values[-1] for option, values in given.items()}
    return Release(
        name=choose_name(last.get("--release"), config, path),
        config=config,
        config_path=path,
        namespace=last.get("--namespace"),
        values=tuple(Path(value) for value in given.get("--values", [])),
        assignments=tuple(given.get("--set", [])),
    )


def _read_config(verb: str, model: type[Model], words: list[str]) -> Model | None:
    """Return the settings of a verb, or None where help was asked for and printed."""
    from tunesmith.config import TunedModelConfig
    from tunesmith.config.flags import parse_flags
    from tunesmith.config.layers import load_settings
    from tunesmith.config.reference import format_help

    if _asks_help(words):
        print(format_help(model, _describe_verb(verb)), end="")
        return None
    flags = parse_flags(model, words, "checkpoints_dir" if issubclass(model, TunedModelConfig) else None)
    section = "run" if verb in _READ_VALUES_TOO else None
    config = load_settings(model, flags.yaml_path, flags.values, os.environ, section)
    configure_logging()
    return config


def _watch(words: list[str]) -> int:
    if _asks_help(words):
        print(_describe_verb("watch"))
        return 0
    given, words = _take_options("watch", words)
    (run,) = _read_words("watch", words, ["RUN"])
    configure_logging()
    from tunesmith.view.watch import watch

    watch(run, once="--once" in given)
    return 0


def _schema(words: list[str]) -> int:
    from tunesmith.config import ConvertConfig, EvaluateConfig, TrainConfig
    from tunesmith.config.reference import format_markdown, json_schema

    if _asks_help(words):
        print(_describe_verb("schema"))
        return 0
    given, words = _take_options("schema", words)
    output_format = given.get("--format", ["json"])[-1]
    if output_format not in ("json", "markdown"):
        raise ConfigError(f"`--format` is `{output_format}`", "it must be json or markdown")
    (verb,) = _read_words("schema", words, ["VERB"])
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


_CLUSTER_OPTIONS = (
    Option(
        "--release",
        "Helm's release, or how a Ray job's id begins; run_name, else the YAML file's or the model's name",
        "NAME",
    ),
    Option("--namespace", "Kubernetes' namespace; kubectl's by default", "NAME", "-n"),
    Option("--values", "values of the chart: image, resources, claims, …; may be repeated", "YAML", "-f"),
    Option("--set", "one value, as image=my-registry/tunesmith:0.1.0; may be repeated", "KEY=VALUE"),
)
_WAIT = Option("--wait", "follow a Ray job's log to its end, and end with its exit code")
_ONCE = Option("--once", "print the run's state and end")
_GPU = Option("--gpu", "plan for GPUs of this kind, as A100-80GB, whatever this machine has", "NAME")
_FORMAT = Option("--format", "JSON schema (default) or reference page", "json|markdown")

# Of a file of the chart's values they take the training alone.
_READ_VALUES_TOO = ("inspect", "plan")

_VERBS = {
    "train": Verb("train [run.yaml] [flags]", "fine-tune a model; the same command again resumes it", _train),
    "evaluate": Verb(
        "evaluate [RUN] [flags]", "score a tuned model beside its base model; a report page", _evaluate
    ),
    "convert": Verb(
        "convert [RUN] [flags]", "export a tuned model as a Hugging Face folder, proven equal", _convert
    ),
    "inspect": Verb("inspect [run.yaml] [flags]", "show the examples a run would train on", _inspect),
    "plan": Verb(
        "plan [run.yaml] [flags]",
        "tell a run's memory, speed and hours before it starts, and what makes it fit",
        _plan,
        (_GPU,),
    ),
    "watch": Verb("watch RUN [--once]", "draw a run's progress from its folder", _watch, (_ONCE,)),
    "submit": Verb(
        "submit [run.yaml] [flags]",
        "train on Kubernetes, with Helm, or on the Ray cluster of RAY_ADDRESS",
        _submit,
        (*_CLUSTER_OPTIONS, _WAIT),
    ),
    "render": Verb(
        "render [run.yaml] [flags]",
        "print what submit would install on Kubernetes",
        _render,
        _CLUSTER_OPTIONS,
    ),
    "schema": Verb(
        "schema VERB [--format json|markdown]",
        "print the settings' schema or reference page",
        _schema,
        (_FORMAT,),
    ),
}


def _asks_help(words: list[str]) -> bool:
    return "--help" in words or "-h" in words


def _take_options(verb: str, words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the values of the verb's options by name, and the other words."""
    return take_options(_VERBS[verb].options, words)


def _read_words(verb: str, words: list[str], wanted: list[str]) -> list[str]:
    """Return the words, which are plain ones, as many as are `wanted` (their names)."""
    usage = f"write `tunesmith {_VERBS[verb].usage}`"
    for word in words:
        if word.startswith("-"):
            names = [option.name for option in _VERBS[verb].options]
            raise ConfigError(f"unknown flag `{word}`", _did_you_mean(word, names) or usage)
    if len(words) < len(wanted):
        raise ConfigError(f"`tunesmith {verb}` needs `{wanted[len(words)]}`", usage)
    if len(words) > len(wanted):
        raise ConfigError(f"`tunesmith {verb}` doesn't take `{words[len(wanted)]}`", usage)
    return words


def _unknown_verb(words: list[str]) -> ConfigError:
    word = words[0]
    rest = " ".join(words)
    if word.startswith("-") or word.endswith((".yaml", ".yml")):
        return ConfigError(f"`{word}` stands before the verb", f"write `tunesmith train {rest}`")
    hint = _did_you_mean(word, _VERBS, "tunesmith ")
    return ConfigError(f"unknown verb `{word}`", hint or f"the verbs are {', '.join(_VERBS)}")


def _did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str | None:
    from tunesmith.config.fields import nearest_name

    near = nearest_name(word, names)
    return f"did you mean `{prefix}{near}`?" if near else None


def _describe_verb(verb: str) -> str:
    usage, summary, options = _VERBS[verb].usage, _VERBS[verb].summary, _VERBS[verb].options
    text = f"usage: tunesmith {usage}\n\n{summary[0].upper()}{summary[1:]}."
    return f"{text}\n\n{format_options(options)}" if options else text


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

"""The command `tunesmith`: finds the verb, turns errors into messages and exit codes. `verbs` holds what verbs do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tunesmith import __version__, verbs
from tunesmith.config import ConvertConfig, EvaluateConfig, TrainConfig
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.options import Option, Verb, did_you_mean

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


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


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_short_help(), end="")
    elif words[0] == "--version":
        print(f"tunesmith {__version__}")
    elif words[0] in VERBS:
        return _run(VERBS[words[0]], words[1:])
    else:
        raise _unknown_verb(words)
    return 0


def _run(verb: Verb, words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(verb.describe(), end="")
        return 0
    return verb.run(verb, words)


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

_RUN = "run"  # what inspect and plan read of a file of the chart's values

VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "train [run.yaml] [flags]",
            "fine-tune a model; the same command again resumes it",
            verbs.run_train,
            TrainConfig,
        ),
        Verb(
            "evaluate [RUN] [flags]",
            "score a tuned model beside its base model; a report page",
            verbs.run_evaluate,
            EvaluateConfig,
        ),
        Verb(
            "convert [RUN] [flags]",
            "export a tuned model as a Hugging Face folder, proven equal",
            verbs.run_convert,
            ConvertConfig,
        ),
        Verb(
            "inspect [run.yaml] [flags]",
            "show the examples a run would train on",
            verbs.run_inspect,
            TrainConfig,
            values_section=_RUN,
        ),
        Verb(
            "plan [run.yaml] [flags]",
            "tell a run's memory, speed and hours before it starts, and what makes it fit",
            verbs.run_plan,
            TrainConfig,
            (_GPU,),
            values_section=_RUN,
        ),
        Verb(
            "watch RUN [--once]", "draw a run's progress from its folder", verbs.run_watch, options=(_ONCE,)
        ),
        Verb(
            "submit [run.yaml] [flags]",
            "train on Kubernetes, with Helm, or on the Ray cluster of RAY_ADDRESS",
            verbs.run_submit,
            TrainConfig,
            (*_CLUSTER_OPTIONS, _WAIT),
        ),
        Verb(
            "render [run.yaml] [flags]",
            "print what submit would install on Kubernetes",
            verbs.run_render,
            TrainConfig,
            _CLUSTER_OPTIONS,
        ),
        Verb(
            "schema VERB [--format json|markdown]",
            "print the settings' schema or reference page",
            verbs.run_schema,
            options=(_FORMAT,),
        ),
    )
}


def _unknown_verb(words: list[str]) -> ConfigError:
    word = words[0]
    rest = " ".join(words)
    if word.startswith("-") or word.endswith((".yaml", ".yml")):
        return ConfigError(f"`{word}` stands before the verb", f"write `tunesmith train {rest}`")
    hint = did_you_mean(word, VERBS, "tunesmith ")
    return ConfigError(f"unknown verb `{word}`", hint or f"the verbs are {', '.join(VERBS)}")


def _short_help() -> str:
    width = max(len(verb.usage) for verb in VERBS.values())
    lines = ["Fine-tune any Hugging Face causal language model on Ray.", ""]
    lines += [f"  tunesmith {verb.usage.ljust(width)}  {verb.summary}" for verb in VERBS.values()]
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

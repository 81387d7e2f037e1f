"""The verbs of the command. Each reads its words, calls what does the work, and prints what came of it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tunesmith.config import (
    ChatConfig,
    ConvertConfig,
    EvaluateConfig,
    ServeConfig,
    Settings,
    TrainConfig,
    TunedModelConfig,
)
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import load_settings
from tunesmith.config.reference import format_markdown, json_schema
from tunesmith.errors import ConfigError, ResourceError
from tunesmith.logs import configure_logging
from tunesmith.options import Option, Verb, did_you_mean, split_passed_on
from tunesmith.paths import expand
from tunesmith.terminal import print_data

if TYPE_CHECKING:
    from tunesmith.chart.release import Release
logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Settings)


def run_train(verb: Verb, words: list[str]) -> int:
    config = _read_settings(verb, TrainConfig, words)
    from rich.console import Console

    from tunesmith.api import fine_tune
    from tunesmith.view.summary import format_summary

    result = fine_tune(config)
    next_steps = []
    if result.ending == "stopped":
        next_steps = [("go on with", _same_command([verb.name, *words]))]
    Console().print(format_summary(result.run, next_steps), soft_wrap=True)
    return result.exit_code


def run_evaluate(verb: Verb, words: list[str]) -> int:
    config = _read_settings(verb, EvaluateConfig, words)
    from rich.console import Console

    from tunesmith.api import evaluate
    from tunesmith.evaluate.table import format_scores

    result = evaluate(config)
    Console().print(format_scores(result.scores), soft_wrap=True)
    print(f"report: {result.folder / 'report.html'}")
    return 0


def run_convert(verb: Verb, words: list[str]) -> int:
    config = _read_settings(verb, ConvertConfig, words)
    from tunesmith.api import convert

    print(convert(config).describe())
    return 0


def run_chat(verb: Verb, words: list[str]) -> int:
    config = _read_settings(verb, ChatConfig, words)
    from tunesmith.serving.terminal import run_chat as answer

    answer(config)
    return 0


def run_serve(verb: Verb, words: list[str]) -> int:
    words, given_to_vllm = split_passed_on(words)
    config = _read_settings(verb, ServeConfig, words)
    from tunesmith.serving.server import serve

    serve(config, given_to_vllm)
    return 0


def run_inspect(verb: Verb, words: list[str]) -> int:
    given, words = verb.take_options(words)
    config = _read_settings(verb, TrainConfig, words)
    from tunesmith.view.inspect import inspect

    inspect(config, html=expand(given["--html"][-1]) if "--html" in given else None)
    return 0


def run_plan(verb: Verb, words: list[str]) -> int:
    given, words = verb.take_options(words)
    config = _read_settings(verb, TrainConfig, words)
    from tunesmith.cluster.resources import allocate, this_machine
    from tunesmith.planning.workers import find_workers, imagine_workers
    from tunesmith.view.plan import plan

    if "--gpu" in given:
        per_node = given.get(_GPUS_PER_NODE.name, [_GPUS_OF_MOST_NODES])[-1]
        workers = imagine_workers(config, given["--gpu"][-1], per_node)
    else:
        try:
            allocation = allocate(config, [this_machine()], "this machine")
        except ResourceError as error:
            raise ResourceError(error.message, "name the GPUs to plan for: --gpu A100-80GB") from error
        workers = find_workers(config, allocation.num_workers, allocation.use_gpu)
    return 0 if plan(config, workers) else 1


def run_watch(verb: Verb, words: list[str]) -> int:
    given, words = verb.take_options(words)
    (run,) = verb.read_words(words, ["RUN"])
    configure_logging()
    from tunesmith.view.watch import watch

    watch(expand(run), once="--once" in given)
    return 0


def run_submit(verb: Verb, words: list[str]) -> int:
    given, words = verb.take_options(words)
    release = _read_release(verb, given, words)
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


def run_render(verb: Verb, words: list[str]) -> int:
    given, words = verb.take_options(words)
    release = _read_release(verb, given, words)
    from tunesmith.chart.release import render

    print_data(render(release))
    return 0


def run_schema(verb: Verb, words: list[str]) -> int:
    given, words = verb.take_options(words)
    output_format = given.get("--format", ["json"])[-1]
    if output_format not in ("json", "markdown"):
        raise ConfigError(f"`--format` is `{output_format}`", "it must be json or markdown")
    (name,) = verb.read_words(words, ["VERB"])
    models: dict[str, type[Settings]] = {
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "convert": ConvertConfig,
        "chat": ChatConfig,
        "serve": ServeConfig,
    }
    if name not in models:
        raise ConfigError(f"there is no schema `{name}`", f"there are those of {', '.join(models)}")
    if output_format == "json":
        print_data(json.dumps(json_schema(models[name]), indent=2, ensure_ascii=False) + "\n")
    else:
        print_data(format_markdown(models[name], name))
    return 0


def _submit_to_ray(release: Release, wait: bool) -> int:
    from tunesmith.chart.places import check_addresses, refuse_relative_paths
    from tunesmith.cluster.ray_job import address_variable, submit_ray_job

    if release.values or release.assignments or release.namespace:
        logger.info(
            "a Ray job, as %s is set: what describes pods and their namespace isn't used", address_variable()
        )
    refuse_relative_paths(release.config, own_home=False)
    check_addresses(release.config)
    job = submit_ray_job(release.config, release.name)
    print(job.describe(), flush=True)
    return job.wait() if wait else 0


def _read_release(verb: Verb, given: dict[str, list[str]], words: list[str]) -> Release:
    """Return the release that the options and settings of a verb describe."""

    # The job's variables are those of its pods.
    config = _read_settings(verb, TrainConfig, words, as_written=True)
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


def _read_settings(verb: Verb, model: type[Model], words: list[str], as_written: bool = False) -> Model:
    """Return the settings of a verb from its words, the environment and its YAML file; log from now on."""

    word = "checkpoints_dir" if issubclass(model, TunedModelConfig) else None
    flags = parse_flags(model, words, word, "more" if issubclass(model, ServeConfig) else None)
    config = load_settings(model, flags.yaml_path, flags.values, os.environ, verb.values_section, as_written)
    configure_logging()
    return config


def _same_command(words: list[str]) -> str:
    """Return a line that runs this program with `words` again, from the same folder and any shell."""
    program = Path(sys.argv[0])
    start = [os.path.relpath(program)] if program.name == "tunesmith" else [sys.executable, "-m", "tunesmith"]
    if shutil.which("tunesmith") == str(program.absolute()):
        start = ["tunesmith"]
    settings = [f"{k}={shlex.quote(v)}" for k, v in os.environ.items() if k.startswith("TUNESMITH_")]
    return " ".join([*settings, shlex.join([*start, *words])])


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
_GPUS_OF_MOST_NODES = "8"
_GPUS_PER_NODE = Option(
    "--gpus_per_node", f"with --gpu: GPUs of each node, {_GPUS_OF_MOST_NODES} by default", "NUMBER"
)
_HTML = Option("--html", "write a page for the browser besides, which needs nothing but itself", "PAGE")
_FORMAT = Option("--format", "JSON schema (default) or reference page", "json|markdown")

_RUN = "run"  # what inspect and plan read of a file of the chart's values

VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "train [run.yaml] [flags]",
            "fine-tune a model; the same command again resumes it",
            run_train,
            TrainConfig,
        ),
        Verb(
            "evaluate [RUN] [flags]",
            "score a tuned model beside its base model; a report page",
            run_evaluate,
            EvaluateConfig,
        ),
        Verb(
            "convert [RUN] [flags]",
            "export a tuned model as a Hugging Face folder, proven equal",
            run_convert,
            ConvertConfig,
        ),
        Verb("chat [RUN] [flags]", "talk to a tuned model in the terminal", run_chat, ChatConfig),
        Verb(
            "serve [RUN] [MORE…] [flags] [-- flags of vLLM]",
            "serve a tuned model, or several adapters of one base, with vLLM's OpenAI-compatible server",
            run_serve,
            ServeConfig,
        ),
        Verb(
            "inspect [run.yaml] [flags]",
            "show the examples a run would train on",
            run_inspect,
            TrainConfig,
            (_HTML,),
            values_section=_RUN,
        ),
        Verb(
            "plan [run.yaml] [flags]",
            "tell a run's memory, speed and hours before it starts, and what makes it fit",
            run_plan,
            TrainConfig,
            (_GPU, _GPUS_PER_NODE),
            values_section=_RUN,
        ),
        Verb("watch RUN [--once]", "draw a run's progress from its folder", run_watch, options=(_ONCE,)),
        Verb(
            "submit [run.yaml] [flags]",
            "train on Kubernetes, with Helm, or on the Ray cluster of RAY_ADDRESS",
            run_submit,
            TrainConfig,
            (*_CLUSTER_OPTIONS, _WAIT),
        ),
        Verb(
            "render [run.yaml] [flags]",
            "print what submit would install on Kubernetes",
            run_render,
            TrainConfig,
            _CLUSTER_OPTIONS,
        ),
        Verb(
            "schema VERB [--format json|markdown]",
            "print the settings' schema or reference page",
            run_schema,
            options=(_FORMAT,),
        ),
    )
}


def refuse_verb(words: list[str]) -> ConfigError:
    """Return the error for words that begin with no verb."""
    word = words[0]
    rest = " ".join(words)
    if word.startswith("-") or word.endswith((".yaml", ".yml")):
        return ConfigError(f"`{word}` stands before the verb", f"write `tunesmith train {rest}`")
    hint = did_you_mean(word, VERBS, "tunesmith ")
    return ConfigError(f"unknown verb `{word}`", hint or f"the verbs are {', '.join(VERBS)}")


def format_verbs() -> str:
    """Return a line for each verb."""
    width = max(len(verb.usage) for verb in VERBS.values())
    lines = ["Fine-tune any Hugging Face causal language model on Ray.", ""]
    lines += [f"  tunesmith {verb.usage.ljust(width)}  {verb.summary}" for verb in VERBS.values()]
    lines += ["", "`tunesmith train --help` lists the settings; `tunesmith --version` prints the version."]
    return "\n".join(lines) + "\n"

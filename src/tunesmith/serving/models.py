"""What a server serves: one base model with adapters on it, or one whole model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.config import ModelRef, ServeConfig
from tunesmith.data.asking import ConversationQuestions
from tunesmith.data.encode import tokenizer_content
from tunesmith.errors import ConfigError
from tunesmith.export.whole import keep_whole
from tunesmith.model.adapters.vllm import vllm_refuses
from tunesmith.model.files.fingerprint import model_fingerprint
from tunesmith.model.load import load_tokenizer
from tunesmith.runs.folder import ORIGIN_FILE, RUN_PREFIX, read_versioned_json
from tunesmith.runs.identity import recorded_date
from tunesmith.runs.tuned import TunedModel, find_tuned
from tunesmith.serving.ready import Ready, make_ready
from tunesmith.serving.template import asks_as_trained, chat_template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_OWN_TEMPLATE = "--chat-template"


@dataclass(frozen=True)
class Served:
    """What vLLM is given.

    `model` is a base model with `adapters` on it by their names, or without any a whole tuned one called `names[0]`.
    `names` are those of the tuned models, the first one's first. `tokenizer` is a folder, None for the model's own.
    `chat_template` is a text, None for the tokenizer's own.
    """

    model: ModelRef
    names: tuple[str, ...]
    adapters: tuple[tuple[str, Path], ...]
    ready: tuple[Ready, ...]
    use_gpu: bool
    tokenizer: Path | None
    chat_template: str | None
    is_asked_by_messages: bool

    @property
    def stop_token_ids(self) -> list[int]:
        return sorted({token for ready in self.ready for token in ready.stop_token_ids})

    @property
    def system_prompt(self) -> str | None:
        """What the first tuned model's conversations began with."""
        questions = self.ready[0].questions
        return questions.system_prompt if isinstance(questions, ConversationQuestions) else None


def find_served(config: ServeConfig, passed_on: Sequence[str] = ()) -> Served:
    """Find the tuned models that the settings mean; what vLLM can't serve as an adapter is merged, once.

    Raises:
        ConfigError: they can't be served together; it names those that differ.
        Else as `find_tuned`, `make_ready` and `export` say.
    """
    use_gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
    given = [_split_name(word) for word in (config.checkpoints_dir, *(config.more or []))]
    tuned = [
        find_tuned(config.model_copy(update={"checkpoints_dir": path})) if path else find_tuned(config)
        for _, path in given
    ]
    for each in tuned:
        logger.info("taking %s: %s (`%s`)", each.label, each.why, each.folder)
    _check_adapters(tuned)
    names = _names(given, tuned)
    _check_bases(names, tuned)
    ready = tuple(make_ready(config, each) for each in tuned)
    reasons = [_why_whole(each, use_gpu) for each in ready]
    templates = [chat_template_of(each.questions, each.tokenizer) for each in ready]
    own = any(word.partition("=")[0] == _OWN_TEMPLATE for word in passed_on)
    _check_alike(names, ready, reasons, [] if own else templates)
    first = ready[0]
    model, adapters = first.loaded, tuple(zip(names, (each.tuned.folder for each in ready), strict=True))
    if reasons[0] is not None:
        whole = keep_whole(first.tuned, config.home, reasons[0])
        model, adapters = ModelRef(whole, None, first.loaded.trust_remote_code), ()
    own_tokenizer = load_tokenizer(model)
    differs = _spelling(own_tokenizer) != _spelling(first.tokenizer)
    if templates[0] is not None and not own:
        _warn_of_other_prompts(names, ready, templates[0])
    template = templates[0] if templates[0] != own_tokenizer.chat_template else None
    return Served(
        model,
        names,
        adapters,
        ready,
        use_gpu,
        first.tuned.folder if differs else None,
        None if own else template,
        is_asked_by_messages=own or templates[0] is not None,
    )


def _split_name(word: str | None) -> tuple[str | None, str | None]:
    """Return the name of its own that a word gives, and the path."""
    name, equals, path = (word or "").partition("=")
    return (name, path) if equals and not Path(word or "").expanduser().exists() else (None, word)


def _names(given: Sequence[tuple[str | None, str | None]], tuned: Sequence[TunedModel]) -> tuple[str, ...]:
    """Return what each tuned model is called: as it was given, else as its run; of several of one run with the step.

    Raises:
        ConfigError: two have the same, or one has the base model's.
    """
    plain = [_name_of(each) for each in tuned]
    names = []
    for (name, _), own, each in zip(given, plain, tuned, strict=True):
        numbered = f"{own}-{each.step}" if plain.count(own) > 1 and each.step is not None else own
        names.append(name or numbered)
    others = [each.base.name for each in tuned if each.base is not None and each.kind == "adapter"]
    for i, name in enumerate(names):
        if name in names[:i] or name in others:
            raise ConfigError(
                f"two models would be served as `{name}`, one of them `{tuned[i].folder}`",
                f"give it a name of its own: my-name={tuned[i].folder}",
            )
    return tuple(names)


def _name_of(tuned: TunedModel) -> str:
    """Return the name of the run that a tuned model came from, else its folder's."""
    if tuned.run is not None:
        return tuned.run.run_name
    if (tuned.folder / ORIGIN_FILE).is_file() and (
        run := read_versioned_json(tuned.folder / ORIGIN_FILE).get("run")
    ):
        return str(run).removeprefix(RUN_PREFIX)
    return tuned.folder.name


def _check_adapters(tuned: Sequence[TunedModel]) -> None:
    """Refuse several models that aren't all adapters."""
    for each in tuned:
        if len(tuned) > 1 and each.kind != "adapter":
            raise ConfigError(
                f"`{_name_of(each)}` is a whole model (`{each.folder}`), and only adapters of one base are served together",
                "serve it by itself, on another --port",
            )


def _check_bases(names: Sequence[str], tuned: Sequence[TunedModel]) -> None:
    """Refuse adapters of bases that differ."""
    if len(tuned) == 1:
        return
    bases = [each.base for each in tuned if each.base is not None]
    fingerprints = [model_fingerprint(base) for base in bases]
    for name, base, fingerprint in zip(names, bases, fingerprints, strict=True):
        if fingerprint != fingerprints[0]:
            raise ConfigError(
                f"`{name}` was made from `{base.source}`, and `{names[0]}` from `{bases[0].source}`",
                "serve adapters of one base together, and others by themselves, on another --port",
            )


def _why_whole(ready: Ready, use_gpu: bool) -> str | None:
    """Return why vLLM can't serve a tuned model as an adapter on its base; None where it can."""
    if ready.tuned.kind != "adapter":
        return "its weights are sharded"
    reason = vllm_refuses(ready.tuned.folder, ready.model_config, use_gpu)
    return reason and f"vLLM can't serve it as an adapter: {reason}"


def _check_alike(
    names: Sequence[str],
    ready: Sequence[Ready],
    reasons: Sequence[str | None],
    templates: Sequence[str | None],
) -> None:
    """Refuse adapters that one server can't serve: it has one tokenizer, one chat template, and unmerged weights."""
    for name, each, reason in zip(names, ready, reasons, strict=True):
        if len(ready) > 1 and reason is not None:
            raise ConfigError(
                f"`{name}` can't be served beside others: {reason}", "serve it by itself, on another --port"
            )
        if _spelling(each.tokenizer) != _spelling(ready[0].tokenizer):
            raise ConfigError(
                f"`{name}` and `{names[0]}` have tokenizers that differ",
                "serve them by themselves, on two ports",
            )
    for name, template in zip(names, templates, strict=False):
        if template != templates[0]:
            raise ConfigError(
                f"`{name}` and `{names[0]}` were trained with chat templates that differ, and a server has one",
                "serve them by themselves, on two ports; or give the one to use: -- --chat-template FILE",
            )


def _warn_of_other_prompts(names: Sequence[str], ready: Sequence[Ready], template: str) -> None:
    for name, each in zip(names, ready, strict=True):
        if not asks_as_trained(each.questions, each.tokenizer, template, recorded_date(each.tuned.params)):
            logger.warning(
                "warning: the chat template doesn't end the prompts of `%s` where training did, in text or in tokens; "
                "`tunesmith chat` asks as it was trained",
                name,
            )


def _spelling(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what decides a tokenizer's tokens: everything but its chat template."""
    content: list[object] = json.loads(tokenizer_content(tokenizer))
    return json.dumps([content[0], content[2]])

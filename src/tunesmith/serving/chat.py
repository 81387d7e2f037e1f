"""A conversation with a tuned model, and with its base beside it: prompts as they were trained, answers as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tunesmith.config import ChatConfig, ModelRef
from tunesmith.data.asking import Exchange, Said
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.base_side import reword
from tunesmith.evaluate.engines.base import EngineSpec, Request, Variant
from tunesmith.evaluate.engines.transformers import TransformersEngine
from tunesmith.evaluate.plan import choose_dtype
from tunesmith.export.whole import keep_whole
from tunesmith.model.load import load_model_config, load_tokenizer
from tunesmith.model.quantized import check_quantization
from tunesmith.remote.copies import copies_in
from tunesmith.runs.tuned import TunedModel, find_tuned
from tunesmith.serving.ready import Ready, make_ready
from tunesmith.serving.streaming import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Show = Callable[[str], None]


@dataclass(frozen=True)
class Speaker:
    """One of the models that answer: what it is called, who generates for it, and how it reads prompts of another's.

    `known` are the tokens that it has rows for; `own` is its tokenizer, None where it knows all of the tuned model's.
    """

    name: Variant
    engine: TransformersEngine
    known: int
    own: PreTrainedTokenizerFast | None = None

    def read(self, prompt_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
        """Return a prompt as this model reads it: in its own tokens, where there are some that it lacks."""
        if self.own is None or max(prompt_ids) < self.known:
            return prompt_ids
        return reword(prompt_ids, tokenizer, self.own)


@dataclass(frozen=True)
class Answer:
    """What was answered; `ending` is stop, length, or interrupted by Ctrl-C."""

    text: str
    ending: str


@dataclass
class Chat:
    """What was said so far, and who answers what is said next."""

    ready: Ready
    speakers: list[Speaker]
    room: int
    before: list[Exchange] = field(default_factory=list)
    num_asked: int = 0

    def prompt_ids(self, said: Said) -> tuple[int, ...]:
        """Return the prompt of a question behind what was said before.

        Raises:
            DataError: it can't be rendered, or it leaves no room for an answer.
        """
        ids = self.ready.questions.prompt(said, self.before).input_ids
        if len(ids) >= self.room:
            hint = "/reset begins anew" if self.before else "ask with less"
            raise DataError(
                f"the prompt takes {len(ids):,} tokens, and the model has room for {self.room:,}", hint
            )
        return ids

    def ask(self, prompt_ids: tuple[int, ...], speaker: Speaker, show: Show) -> Answer:
        """Return a speaker's answer, and `show` its pieces as they come; Ctrl-C stops it."""
        stream = TextStream(self.ready.tokenizer)
        pieces: list[str] = []

        def say(piece: str) -> None:
            if piece:
                pieces.append(piece)
                show(piece)

        def take(token: int) -> None:
            if token not in self.ready.stop_token_ids:
                say(stream.push(token))

        request = Request(self.num_asked, speaker.name, speaker.read(prompt_ids, self.ready.tokenizer))
        try:
            ending: str = speaker.engine.stream(request, take).finish_reason
        except KeyboardInterrupt:
            ending = "interrupted"
        say(stream.flush())
        return Answer("".join(pieces), ending)

    def remember(self, said: Said, answer: Answer) -> None:
        """Keep an exchange for the next prompt, where prompts hold earlier ones."""
        self.num_asked += 1
        if self.ready.questions.remembers and answer.text.strip():
            self.before.append(Exchange(said, answer.text))

    def reset(self) -> None:
        """Forget what was said."""
        self.before.clear()


@contextmanager
def open_chat(config: ChatConfig) -> Iterator[Chat]:
    """Find and load the tuned model that the settings mean, and its base where both are to answer.

    Raises:
        ConfigError, DataError, ModelError, RunError: bad input, before anything is loaded.
    """
    tuned = find_tuned(config)
    with copies_in(tuned.run.home if tuned.run else config.home):
        logger.info("taking %s: %s (`%s`)", tuned.label, tuned.why, tuned.folder)
        if config.compare == "base" and tuned.base is None:
            raise ConfigError(
                f"`compare` is base, but the base model of `{tuned.folder}` isn't known",
                "give --model_path or --base_model",
            )
        ready = make_ready(config, tuned, _asked_with(config))
        check_quantization(ready.model_config, str(ready.loaded.source))
        ready.questions.prompt(
            dict.fromkeys(ready.questions.fields, "Hi")
        )  # what the template refuses shows now
        speakers = _load(config, ready)
    try:
        yield Chat(ready, speakers, ready.positions or 1 << 30)
    finally:
        for engine in {id(speaker.engine): speaker.engine for speaker in speakers}.values():
            engine.close()


def _asked_with(config: ChatConfig) -> str | None:
    """Return the system prompt as `make_ready` takes it."""
    text = config.system_prompt
    return {"auto": None, "none": ""}.get(text.strip().lower(), text)


def _load(config: ChatConfig, ready: Ready) -> list[Speaker]:
    tuned = ready.tuned
    if tuned.kind == "adapter":
        engine = TransformersEngine(_spec(config, ready, ready.loaded, tuned))
        speakers = [Speaker("tuned", engine, ready.num_known)]
        return (
            [*speakers, _base_speaker(ready, ready.loaded, engine)] if config.compare == "base" else speakers
        )
    whole = ModelRef(
        keep_whole(tuned, config.home, "its weights are sharded"), None, ready.loaded.trust_remote_code
    )
    speakers = [Speaker("tuned", TransformersEngine(_spec(config, ready, whole)), ready.num_known)]
    if config.compare == "base":
        assert tuned.base is not None, "checked before"
        engine = TransformersEngine(_spec(config, ready, tuned.base))
        speakers.append(_base_speaker(ready, tuned.base, engine))
    return speakers


def _base_speaker(ready: Ready, base: ModelRef, engine: TransformersEngine) -> Speaker:
    known = load_model_config(base).get_text_config().vocab_size
    own = load_tokenizer(base) if known < ready.num_known else None
    return Speaker("base", engine, known, own)


def _spec(config: ChatConfig, ready: Ready, model: ModelRef, adapted: TunedModel | None = None) -> EngineSpec:
    use_gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
    if use_gpu and not torch.cuda.is_available():
        raise ConfigError("`use_gpu` is true, and this machine has no GPU", "leave it out")
    dtype = choose_dtype(config.dtype, ready.tuned, use_gpu)
    logger.info("loading `%s`, to answer in %s on the %s", model.source, dtype, "GPU" if use_gpu else "CPU")
    return EngineSpec(
        model=model,
        adapter=adapted.folder if adapted else None,
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=ready.positions or 1 << 30,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_token_ids=ready.stop_token_ids,
        seed=config.seed,
        batch_size=1,
        use_gpu=use_gpu,
    )

"""BERTScore: its encoder, found and proven before anything is generated, and its scores."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from bert_score import BERTScorer

logger = logging.getLogger(__name__)

# bert-score keeps the vectors of every token of a call: at 512 tokens of 1,024 values, 1 GiB for these.
_SAMPLES_AT_ONCE = 256
_BATCH_SIZE = 32
# For encoders that count positions relative to one another and whose tokenizer names no limit.
_MAX_LENGTH = 512
# What transformers and bert-score raise for a folder that isn't an encoder's, or not a whole one.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    AssertionError,
    RuntimeError,
    SafetensorError,
)
_HINT = "give --bertscore_model the folder of an encoder, or let this machine reach the hub once"


@dataclass(frozen=True)
class BertScore:
    """BERTScore F1 (Zhang et al. 2020) with one encoder; without idf weights, not rescaled.

    `num_layers` is the layer whose vectors are compared, `max_length` the tokens of a text that are read.
    """

    encoder: str
    num_layers: int
    max_length: int
    device: str

    @cached_property
    def _scorer(self) -> BERTScorer:
        return _load_scorer(self.encoder, self.num_layers, self.max_length, self.device)

    def describe(self) -> str:
        """Return what the scores depend on."""
        name = _recorded_name(self.encoder) or (
            Path(self.encoder).name if Path(self.encoder).is_dir() else self.encoder
        )
        return (
            f"encoder {name}, layer {self.num_layers}, the first {self.max_length} tokens of a text, "
            f"no idf, not rescaled, 0 for an empty text; bert-score {version('bert-score')}"
        )

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """Return each prediction's F1, about 0 to 1; 0 where the prediction or the reference is empty."""
        scores: list[float | None] = [0.0] * len(references)
        # bert-score stumbles over empty texts since transformers 5.
        filled = [
            i for i, pair in enumerate(zip(predictions, references, strict=True)) if all(map(str.strip, pair))
        ]
        for first in range(0, len(filled), _SAMPLES_AT_ONCE):
            part = filled[first : first + _SAMPLES_AT_ONCE]
            _, _, f1 = self._scorer.score(
                [predictions[i] for i in part], [references[i] for i in part], batch_size=_BATCH_SIZE
            )
            for i, value in zip(part, f1.tolist(), strict=True):
                scores[i] = value
        return scores


def find_bertscore(encoder: str | None, device: str) -> BertScore:
    """Return BERTScore with this encoder, a hub id or a folder; None is bert-score's own for English.

    The encoder is loaded once, on the CPU, and let go: whoever generates next needs the memory. The layer is
    that of bert-score's table; for an encoder that isn't in it, three quarters of the way up, where most of
    the table's lie: 9 of 12, 5 of 6.

    Raises:
        ModelError: the encoder is absent, lacks weights, or is no encoder that bert-score can use.
    """
    from bert_score.utils import lang2model
    from transformers import AutoConfig, AutoTokenizer

    name = encoder or lang2model["en"]
    folder = Path(name).expanduser()
    if folder.is_dir():
        # By its full path, so that bert-score doesn't take a folder called `scibert…` for a download.
        name = str(folder.absolute())
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        _check_path(name, config.model_type)
        _check_weights(name)
        num_layers = _choose_layer(name, config.num_hidden_layers)
        max_length = _limit_length(tokenizer.model_max_length, config)
        _load_scorer(name, num_layers, max_length, "cpu").score(["a text"], ["another one"])
    except ModelError:
        raise
    except _LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"BERTScore's encoder `{name}` can't be had: {reason}", _HINT) from error
    logger.info("BERTScore compares layer %d of `%s`", num_layers, name)
    return BertScore(name, num_layers, max_length, device)


def _check_path(name: str, model_type: str) -> None:
    if "t5" in name and "t5" not in model_type:
        raise ModelError(
            f"bert-score takes `{name}` for a T5 encoder, because of the `t5` in it; it is of type {model_type}",
            "give --bertscore_model a path without `t5`",
        )


def _check_weights(name: str) -> None:
    from transformers import AutoModel

    with _quiet_transformers():
        _, found = AutoModel.from_pretrained(name, output_loading_info=True)
    # The pooler sits on top of the layers and isn't used.
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(f"the files of `{name}` lack weights: {', '.join(missing[:3])} …", _HINT)


def _choose_layer(name: str, num_hidden_layers: int) -> int:
    from bert_score.utils import model2layers

    for candidate in (name, _recorded_name(name), Path(name).name):
        layer = model2layers.get(candidate)
        if layer is not None and layer <= num_hidden_layers:
            return int(layer)
    return math.floor(0.75 * num_hidden_layers + 0.5)


def _recorded_name(name: str) -> str | None:
    """Return the hub id that an encoder's folder says it came from."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return None
    recorded = json.loads(path.read_text(encoding="utf-8")).get("_name_or_path")
    return recorded or None


def _limit_length(tokenizer_limit: int, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return min(tokenizer_limit, _MAX_LENGTH)
    if tokenizer_limit <= positions:
        return tokenizer_limit
    # A tokenizer without a limit says 1e30, which it then can't count to. RoBERTa's kind begins to count
    # positions after the padding id.
    return int(positions - (config.pad_token_id or 0) - 1)


def _load_scorer(encoder: str, num_layers: int, max_length: int, device: str) -> BERTScorer:
    from bert_score import BERTScorer

    with _quiet_transformers():
        scorer = BERTScorer(model_type=encoder, num_layers=num_layers, device=device)
    scorer._tokenizer.model_max_length = max_length
    return scorer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep its report on the unused heads of an encoder out of the log."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)

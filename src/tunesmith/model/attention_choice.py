"""Which attention backend computes all that a model asks of its attention, as its configuration's own fields tell it.

transformers hands each backend what a model wants of its scores, and a backend that doesn't know the word leaves it
out without one. What fields don't tell is found by trying: `attention_probe`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.compat import supports_sdpa
from tunesmith.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

EAGER = "eager"
SDPA = "sdpa"
_FLASH = "flash_attention_2"
# Masks and scores: whatever a model asks for.
BACKENDS_THAT_KNOW_ALL = (EAGER, "flex_attention")

# `attn_logit_softcapping`, `attention_logit_cap`; not those of the final logits or of a router.
_CAP = re.compile(r"^(?!.*router).*att.*cap")
_SINK = re.compile(r"(^|_)sinks?($|_)")
_BIAS = re.compile(r"^alibi$|^use_alibi$|position_bias$|relative_attention(_bias|_num_buckets)?$")
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size")


@dataclass(frozen=True)
class Wish:
    """Something that a model does with its scores: what it is called, and the backends that leave it out."""

    words: str
    left_out_by: tuple[str, ...]


def find_wishes(model_config: PretrainedConfig) -> Iterator[Wish]:
    """Yield what the model of this configuration does with its attention scores."""
    for name, value in _list_fields(model_config):
        if not value or isinstance(value, (str, list, dict)):
            continue
        if _CAP.search(name):
            # FlashAttention has caps since 2.6; whether this one has is tried.
            yield Wish(f"a cap on attention scores (`{name}` is {value})", (SDPA,))
        elif _SINK.search(name):
            yield Wish(f"attention sinks (`{name}`)", (SDPA, _FLASH))
        elif _BIAS.search(name):
            yield Wish(f"biases of positions (`{name}`)", (_FLASH,))


def name_left_out(attention: str, model_config: PretrainedConfig) -> list[str]:
    """Return in words what this backend leaves out of what the model does with its scores."""
    return [wish.words for wish in find_wishes(model_config) if attention in wish.left_out_by]


def choose_attention(
    model_config: PretrainedConfig,
    device_type: str,
    is_half: bool,
    attn_implementation: str,
    supports_flash: Callable[[], bool],
) -> str | None:
    """Return transformers' name of the attention backend to ask for; None: SDPA if the model has it, else eager.

    Args:
        model_config: the model's.
        device_type: `cpu` or `cuda`.
        is_half: whether it computes in two bytes: FlashAttention computes in nothing longer.
        attn_implementation: as the settings have it.
        supports_flash: whether the model can attend with FlashAttention; asked where all else speaks for it.
    """
    if attn_implementation not in ("auto", "varlen"):
        return attn_implementation
    # What was asked for as `varlen` takes the place of the model's own once that is built.
    may_flash = attn_implementation == "auto" and device_type == "cuda" and is_half
    if may_flash and not name_left_out(_FLASH, model_config) and _is_flash_2_installed() and supports_flash():
        return _FLASH
    return EAGER if name_left_out(SDPA, model_config) else None


def is_flash(attention: str) -> bool:
    """Return whether a backend is a FlashAttention, `flash_attention_3` or `kernels-community/flash-attn2`."""
    return "flash" in attention


def may_use_varlen(attn_implementation: str, own: str) -> bool:
    """Return whether the settings leave room for `varlen` in the place of the model's `own` backend."""
    return attn_implementation == "varlen" or (attn_implementation == "auto" and not is_flash(own))


def check_attention(attn_implementation: str, model: Any, source: str) -> None:
    """Refuse a backend that the model, called `source`, doesn't have, and warn of one that leaves something out.

    Raises:
        ConfigError: it doesn't have it.
    """
    if attn_implementation == SDPA and not supports_sdpa(model):
        raise ConfigError(
            f"`attn_implementation` is `{SDPA}`, which `{source}` can't attend with",
            f"leave `attn_implementation` out, or set it to `{EAGER}`",
        )
    if name_left_out(attn_implementation, model.config):
        warn_of_other_attention(attn_implementation, model.config, source)


def warn_of_other_attention(attention: str, model_config: PretrainedConfig, source: str) -> None:
    """Warn that a backend which was asked for doesn't compute the attention of the model, called `source`."""
    left_out = name_left_out(attention, model_config) or ["something that is asked of the scores"]
    logger.warning(
        "attention `%s` leaves out %s in `%s`: what it trains isn't the model that is served; a new run without "
        "`attn_implementation`, or with `%s`, trains that",
        attention,
        " and ".join(left_out),
        source,
        EAGER,
    )


def _is_flash_2_installed() -> bool:
    # FlashAttention 4 is a package `flash_attn` too.
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def _list_fields(model_config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    text_config = model_config.get_text_config()
    # `attn_config`: where MPT has them.
    for holder in (text_config, getattr(text_config, "attn_config", None)):
        if holder is not None:
            yield from (holder if isinstance(holder, dict) else vars(holder)).items()

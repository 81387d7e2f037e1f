"""What the log says of rows that are longer than a sequence."""

from __future__ import annotations

import logging

from tunesmith.config import TrainConfig
from tunesmith.data.token_arrays import SetStats

logger = logging.getLogger(__name__)

# From this share of the tokens on, a loss is a warning.
_MUCH = 0.01


def log_long(stats: SetStats, config: TrainConfig) -> None:
    """Log what of a set's rows was split, lost and cut."""
    limit = f"max_seq_length ({config.max_seq_length} tokens)"
    if stats.split:
        logger.info(
            "%s longer than %s: split into %s windows; every token after a text's first is trained once",
            count(stats.split, "text"),
            limit,
            f"{stats.windows:,}",
        )
    if stats.lost_tokens:
        all_tokens = stats.tokens + stats.lost_tokens
        logger.log(
            logging.WARNING if stats.lost_tokens > _MUCH * all_tokens else logging.INFO,
            "%s (%s) lost beyond %s: %s",
            count(stats.lost_tokens, "token"),
            percent(stats.lost_tokens, all_tokens),
            limit,
            _describe_loss(stats),
        )
    if config.concatenate:
        logger.info(
            "concatenate: %s cut where a pack ends, and trained behind the cut without what is before it; "
            "%s filled up with the untrained beginning of an example that the next one holds whole",
            count(stats.cut, "example"),
            count(stats.untrained_pieces, "pack"),
        )


def _describe_loss(stats: SetStats) -> str:
    told = {
        "truncated": stats.truncated,
        "dropped because the prompt alone fills it": stats.long_prompts,
        "dropped because long_examples is drop": stats.over_long,
    }
    examples = [f"{count(number, 'example')} {what}" for what, number in told.items() if number]
    answers = [f"{count(stats.lost_answers, 'answer')} lost whole"] if stats.lost_answers else []
    return ", ".join(examples + answers)


def count(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    """Return a share as text."""
    return f"{100 * part / whole:.1f} %" if whole else "–"

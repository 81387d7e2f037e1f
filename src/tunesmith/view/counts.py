"""The figures of prepared sets, each with what it means: the terminal's table and the page's are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tunesmith.data.comparison import RowHashes, are_shared, count_repeats
from tunesmith.data.summary import percent
from tunesmith.data.token_arrays import SetStats


@dataclass(frozen=True)
class Count:
    """One figure of one set; the page shows the explanation. A rare one is shown where there is any."""

    label: str
    value: str
    explanation: str = ""
    is_rare: bool = False


def list_counts(stats: SetStats) -> list[Count]:
    """Return what became of a set's rows. A figure that is to be shown is added here and nowhere else."""
    return [
        Count("rows", f"{stats.rows:,}", "lines of the set's .jsonl"),
        Count("examples", f"{stats.examples:,}", "what the rows gave to train on, or to measure the loss by"),
        Count("texts split", f"{stats.split:,}", "rows of text longer than max_seq_length", is_rare=True),
        Count("  into windows", f"{stats.windows:,}", "in which every token is trained once", is_rare=True),
        Count("cut where a pack ends", f"{stats.cut:,}", "examples that lie in several packs", is_rare=True),
        Count("truncated", f"{stats.truncated:,}", "examples cut at the right, at max_seq_length"),
        Count(
            "dropped", f"{stats.dropped:,}", "rows or examples without a trained token within max_seq_length"
        ),
        Count("  without a completion", f"{stats.untrained:,}", "of these, without one at whatever length"),
        Count(
            "  prompt alone too long", f"{stats.long_prompts:,}", "of these, without room for a completion"
        ),
        Count("  longer than max_seq_length", f"{stats.over_long:,}", "left out as asked for", is_rare=True),
        Count("tokens", f"{stats.tokens:,}"),
        Count(
            "trained",
            f"{stats.trained_tokens:,} ({percent(stats.trained_tokens, stats.tokens)})",
            "tokens that the loss is taken of",
        ),
        Count(
            "lost for their length",
            f"{stats.lost_tokens:,} ({percent(stats.lost_tokens, stats.tokens + stats.lost_tokens)})",
            "tokens beyond max_seq_length, and those of what was dropped for it",
        ),
        Count("answers lost", f"{stats.lost_answers:,}", "of which not a token is left", is_rare=True),
        Count("longest example", f"{stats.longest:,}", "in tokens"),
        Count("packs", f"{stats.packs:,}", "sequences that examples share"),
        Count("packing efficiency", f"{100 * stats.packing_efficiency:.1f} %", "how full the packs are"),
    ]


def compare_sets(hashes: Mapping[str, RowHashes]) -> dict[str, list[Count]]:
    """Return for each set by name how many of its rows repeat one another, and how many the training set has too."""
    return {name: _compare(name, of_set, hashes["training"]) for name, of_set in hashes.items()}


def _compare(name: str, of_set: RowHashes, training: RowHashes) -> list[Count]:
    def share(part: int) -> str:
        return f"{part:,} ({percent(part, len(of_set))})" if part else "0"

    def shared(own: np.ndarray, others: np.ndarray) -> str:
        return "" if name == "training" else share(int(are_shared(own, [others]).sum()))

    return [
        Count(
            "repeated rows",
            share(count_repeats([of_set.equal])),
            "that say the same as an earlier one of the set",
        ),
        Count(
            "  counting nearly equal ones",
            share(count_repeats([of_set.alike])),
            "which differ in case and white space alone",
        ),
        Count(
            "in the training set too",
            shared(of_set.equal, training.equal),
            "rows that are both trained on and measured by",
        ),
        Count(
            "  counting nearly equal ones",
            shared(of_set.alike, training.alike),
            "which differ in case and white space alone",
        ),
    ]

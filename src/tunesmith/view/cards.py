"""Examples and dropped rows as the page shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape

from tunesmith.data.fates import Fate
from tunesmith.view.examples_shown import Choice, ShownSet
from tunesmith.view.pieces import Speller
from tunesmith.view.stretches import cut_stretches
from tunesmith.view.visible import escape_unseen, mark_up, shorten_middle

_LOST_SHOWN = 40
_OF_DROPPED_SHOWN = 160
_LONGEST_FIELD_CHARS = 1500


@dataclass(frozen=True)
class Card:
    """One example, or one row that gives none. `kinds` are what one can filter by, `notes` say why.

    `part` counts the examples of its row from 1, and is 0 where the row has but one.
    """

    set_name: str
    dataset_id: int
    row: int
    part: int
    num_tokens: int
    num_trained: int
    kinds: tuple[str, ...]
    notes: tuple[str, ...]
    body: Markup


class CardMaker:
    """Lays out what is shown of one set."""

    def __init__(self, shown: ShownSet, speller: Speller, max_seq_length: int) -> None:
        self._shown = shown
        self._speller = speller
        self._max_seq_length = max_seq_length

    def lay_out(self, choice: Choice, fate: Fate, allowance: int) -> Card:
        """Return the card of a choice, with about `allowance` of its tokens."""
        kinds, notes = self._compare(choice.row)
        if choice.example is None:
            return self._lay_out_dropped(choice, fate, allowance, kinds, notes)
        ids, trained = self._shown.tokens.example(choice.example)
        lengths = self._shown.tokens.segments[choice.example]
        lost = _find_whole(fate, ids) if len(lengths) == 1 else None
        if fate.counts.truncated and (lost or len(fate.examples) == 1):
            kinds.append("truncated")
            notes.append(_describe_lost(lost, len(ids)))
        if fate.counts.split:
            notes.append(
                f"one of {fate.counts.windows:,} windows of a text; its first token is the last of the window before"
            )
        if fate.counts.dropped:
            notes.append(f"{fate.counts.dropped:,} more of this row's examples are dropped")
        borders = [0, *np.cumsum(lengths).tolist()]
        segments = [
            self._mark_tokens(ids[start:stop].tolist(), trained[start:stop], allowance // len(lengths))
            for start, stop in pairwise(borders)
        ]
        return Card(
            self._shown.name,
            fate.dataset_id,
            choice.row,
            self._part_of(choice.row, choice.example),
            len(ids),
            int(trained.sum()),
            tuple(kinds),
            tuple(notes),
            Markup("<hr>").join(segments) + (self._mark_lost(lost, len(ids)) if lost else ""),
        )

    def _lay_out_dropped(
        self, choice: Choice, fate: Fate, allowance: int, kinds: list[str], notes: list[str]
    ) -> Card:
        segments = [segment for example in fate.examples for segment in example.segments]
        notes.insert(0, f"dropped: {_why_dropped(fate, self._max_seq_length)}")
        each = min(allowance, _OF_DROPPED_SHOWN) // max(1, len(segments))
        body = Markup("<hr>").join(self._mark_untrained(segment.input_ids, each) for segment in segments)
        return Card(
            self._shown.name,
            fate.dataset_id,
            choice.row,
            0,
            sum(len(segment.input_ids) for segment in segments),
            0,
            ("dropped", *kinds),
            tuple(notes),
            body if segments else _mark_row(fate),
        )

    def _part_of(self, row: int, example: int) -> int:
        first, beyond = (
            int(np.searchsorted(self._shown.tokens.rows, row, side)) for side in ("left", "right")
        )
        return example - first + 1 if beyond - first > 1 else 0

    def _compare(self, row: int) -> tuple[list[str], list[str]]:
        kinds, notes = [], []
        if self._shown.is_repeated[row]:
            kinds.append("repeated")
            notes.append("another row of the set says the same")
        if self._shown.is_shared[row]:
            kinds.append("shared")
            notes.append("another set holds a row that says the same")
        return kinds, notes

    def _mark_tokens(self, ids: Sequence[int], trained: np.ndarray, allowance: int) -> Markup:
        parts: list[str] = []
        for stretch in cut_stretches(trained, allowance):
            hidden = stretch.hidden_to - stretch.hidden_from
            parts.append("<mark>" if stretch.is_trained else "")
            parts.extend(self._mark_pieces(ids, stretch.start, stretch.hidden_from))
            parts.append(f"<em>… {hidden:,} tokens …</em>" if hidden else "")
            parts.extend(self._mark_pieces(ids, stretch.hidden_to, stretch.stop))
            parts.append("</mark>" if stretch.is_trained else "")
        return Markup("".join(parts))

    def _mark_pieces(self, ids: Sequence[int], start: int, stop: int) -> Iterator[str]:
        for piece in self._speller.spell(ids, start, stop):
            yield _mark_piece(piece.text, tuple(ids[piece.start : piece.stop]), piece.is_added)

    def _mark_untrained(self, ids: Sequence[int], allowance: int) -> Markup:
        """Return what there is of a segment that isn't trained, up to the limit and beyond."""
        kept = ids[: self._max_seq_length]
        return self._mark_tokens(kept, np.zeros(len(kept), dtype=bool), allowance) + self._mark_lost(
            ids, len(kept)
        )

    def _mark_lost(self, ids: Sequence[int], length: int) -> Markup:
        """Return the beginning of what is cut off behind the first `length` tokens."""
        if len(ids) == length:
            return Markup("")
        stop = min(len(ids), length + _LOST_SHOWN)
        more = f"<em>… {len(ids) - stop:,} tokens …</em>" if stop < len(ids) else ""
        return Markup(f"<del>{''.join(self._mark_pieces(ids, length, stop))}{more}</del>")


@lru_cache(maxsize=16384)
def _mark_piece(text: str, ids: tuple[int, ...], is_added: bool) -> str:
    spelt = escape_unseen(text).replace("\n", "\\n").replace("\t", "\\t")
    title = f"{' '.join(map(str, ids))} “{spelt}”"
    added = ' class="x"' if is_added else ""
    return f'<i{added} title="{escape(title)}">{mark_up(text)}</i>'


def _why_dropped(fate: Fate, max_seq_length: int) -> str:
    """Return why nothing is left of a row; every reason that `Counts` tells has its sentence here."""
    if fate.counts.untrained:
        return "it has no completion, so nothing of it could be trained"
    if fate.counts.over_long:
        return f"it is longer than max_seq_length ({max_seq_length:,}), and long_examples is drop"
    return f"its prompt alone fills max_seq_length ({max_seq_length:,}), so no trained token is left"


def _find_whole(fate: Fate, ids: np.ndarray) -> list[int] | None:
    """Return the tokens of the example that was cut to `ids`, None if none was."""
    if not fate.counts.truncated:
        return None
    for example in fate.examples:
        whole = example.segments[0].input_ids
        if len(whole) > len(ids) and np.array_equal(whole[: len(ids)], ids):
            return whole
    return None


def _describe_lost(lost: list[int] | None, length: int) -> str:
    if lost is None:
        return "truncated: the row is longer than max_seq_length"
    return f"truncated: {len(lost) - length:,} of its {len(lost):,} tokens are cut off"


def _mark_row(fate: Fate) -> Markup:
    """Return a row that never became tokens, field by field."""
    fields = Markup("")
    for name, value in fate.rendered.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown = mark_up(shorten_middle(text, _LONGEST_FIELD_CHARS)) if text else Markup("<em>empty</em>")
        fields += Markup("<h4>{}</h4><div>{}</div>").format(escape_unseen(name), shown)
    return fields

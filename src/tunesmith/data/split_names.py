"""Which split a name speaks of, as the `datasets` library has it, and without regard to case."""

from __future__ import annotations

import re

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {keyword: split for split, keywords in _KEYWORDS.items() for keyword in keywords}
# `trainset` and `test_data` too, which people write and the library reads past.
_WORD = re.compile(rf"({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?:set|data|split)?")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def standard_split(split: str) -> str | None:
    """Return `train`, `validation` or `test` if `split` is one of them by any of their names."""
    return _SPLIT_OF.get(split.lower())


def splits_of_name(name: str) -> set[str]:
    """Return the splits of which a file's, a folder's or a key's name speaks: of none, one or several.

    A word counts where no letter touches it: `my-train_01.jsonl`, `TEST.csv`, `gsmTest.jsonl`, not `latest.jsonl`.
    """
    words = {word.lower() for text in (name, _HUMP.sub(" ", name)) for word in re.findall(r"[^\W\d_]+", text)}
    return {_SPLIT_OF[match[1]] for word in words if (match := _WORD.fullmatch(word))}


def split_of_name(name: str) -> str | None:
    """Return the split of which a name speaks; None if of none, or of several."""
    splits = splits_of_name(name)
    return next(iter(splits)) if len(splits) == 1 else None

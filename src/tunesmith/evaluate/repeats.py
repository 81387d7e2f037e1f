"""Which samples of a test set ask the same, and which of them the run was trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from tunesmith.data.comparison import Found, find_in_rows, hash_alike
from tunesmith.data.formats import Prompt, RenderedRow, RowFormat
from tunesmith.data.mixture import recorded_formats
from tunesmith.runs.tuned import TunedModel

logger = logging.getLogger(__name__)


def group_alike(prompts: Mapping[int, Prompt]) -> dict[int, int]:
    """Return for each sample the first one that asks the same, but for case and white space.

    A model answers them alike, whatever their references are: to intervals they are one sample.
    """
    first: dict[int, int] = {}
    return {number: first.setdefault(hash_alike(prompt.text), number) for number, prompt in prompts.items()}


def find_trained(
    tuned: TunedModel, formats: Sequence[RowFormat], rows: Mapping[int, RenderedRow]
) -> dict[int, Found] | None:
    """Return which of the rendered rows the run was trained on; None where its training set isn't known.

    `formats` are those of the rows.
    """
    if tuned.data_dir is None or tuned.params is None:
        return None
    path = tuned.data_dir / "training.jsonl"
    if not path.is_file():
        logger.warning("`%s` is not there: whether the test rows were trained on can't be told", path)
        return None
    trained_formats = recorded_formats(tuned.params["data"]["row_format"], tuned.dataset.sources)
    return find_in_rows(rows, formats, path, trained_formats)

"""Where the test rows of an evaluation are read from, and how they become rendered rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.config import EvaluateConfig, HFDatasetConfig
from tunesmith.data.formats import RenderedRow, RowFormat, choose_format
from tunesmith.data.formats.template import TemplateFormat
from tunesmith.data.mixture import recorded_formats, without_tag
from tunesmith.data.sources import describe_source, local_path, read_rows
from tunesmith.data.split import check_other_split
from tunesmith.errors import DataError
from tunesmith.paths import exists, expand_user
from tunesmith.runs.tuned import TunedModel
from tunesmith.urls import is_url

logger = logging.getLogger(__name__)

_RENDERED = {"input", "output"}
# What hints say of a run's data sets, and what it is here.
_OWN_WORDS = {
    "--split": "--test_split",
    "dataset_config, split": "test_config, test_split",
    "dataset_config": "test_config",
    "take its Parquet branch: dataset_revision: refs/convert/parquet": (
        "download its Parquet branch, refs/convert/parquet, and give that folder as --test_dataset"
    ),
}


def find_test_rows(tuned: TunedModel, config: EvaluateConfig) -> HFDatasetConfig:
    """Return where the rows are read from: the set or the split that was named, else the run's own test set."""
    if config.test_dataset is not None:
        named = HFDatasetConfig.as_written(
            dataset_name=config.test_dataset,
            dataset_config=config.test_config,
            split=config.test_split or "test",
        )
        try:
            path = local_path(named)
        except DataError as error:
            if is_url(config.test_dataset) or exists(expand_user(config.test_dataset)):
                raise _with_own_hint(error) from error
            raise DataError(
                f"there is no test file `{config.test_dataset}`",
                "give a hub id, or a JSONL, JSON, CSV or Parquet file",
            ) from error
        return named if path is None else named.model_copy(update={"dataset_name": str(path)})
    if config.test_split is None:
        return HFDatasetConfig.as_written(dataset_name=str(_own_test_set(tuned)), split="test")
    if tuned.params is None or len(tuned.dataset.data_sets) > 1:
        known = "no data set is known" if tuned.params is None else "there are several data sets"
        raise DataError(
            f"`test_split` is `{config.test_split}`, and {known} of which it could be a split",
            "name its data set: --test_dataset",
        )
    (trained,) = tuned.dataset.data_sets
    check_other_split(trained, config.test_split, "test_split")
    return trained.model_copy(update={"split": config.test_split, "name": None})


def _own_test_set(tuned: TunedModel) -> Path:
    if tuned.data_dir is None:
        raise DataError(
            f"no run is known for `{tuned.folder}`, and so no test set",
            "give one with --test_dataset rows.jsonl",
        )
    path = tuned.data_dir / "test.jsonl"
    if not path.is_file():
        raise DataError(
            f"the run's test set `{path}` is not there", "give one with --test_dataset rows.jsonl"
        )
    if path.stat().st_size == 0:
        raise DataError(
            f"the run kept no test set: `{path}` is empty",
            "give one with --test_dataset rows.jsonl; a new run keeps one with --train_split_ratio 0.9",
        )
    return path


def render_test_rows(
    tuned: TunedModel, config: EvaluateConfig, settings: HFDatasetConfig
) -> tuple[Iterator[RenderedRow], list[RowFormat]]:
    """Return the rows of the test set, and the formats of the data sets that they are of."""
    path = Path(settings.dataset_name)
    is_own = tuned.data_dir is not None and path.parent.absolute() == tuned.data_dir.absolute()
    given = config.given_reading
    if is_own and tuned.params is not None:
        if given:
            logger.warning("`%s` isn't used: the run has rendered its own test set", next(iter(given)))
        formats = recorded_formats(tuned.params["data"]["row_format"], tuned.dataset.sources)
        return (row for _, row in read_rows(settings)), formats
    first = _read_first(settings)
    source = describe_source(settings)
    known = [data_set.model_copy(update=given) for data_set in tuned.dataset.data_sets]
    templates = TemplateFormat.from_settings(known[0])
    if set(without_tag(first)) == _RENDERED and templates.absent_from(first):
        logger.info("%s: rows are rendered already, as input and output", source)
        return (without_tag(row) for _, row in read_rows(settings)), [templates]
    row_format = _choose_for_file(known, first, source)
    logger.info("%s: rows are read as %s, because %s", source, row_format.name, row_format.why)
    return (row_format.render(row, where) for where, row in read_rows(settings)), [row_format]


def _read_first(settings: HFDatasetConfig) -> dict[str, Any]:
    try:
        return next(read_rows(settings))[1]
    except DataError as error:
        raise _with_own_hint(error) from error


def _with_own_hint(error: DataError) -> DataError:
    """Return an error of the data sets' with the settings that evaluate has: the split of a run's rows is --split."""
    hint = error.hint
    for words, own in _OWN_WORDS.items():
        hint = hint and re.sub(rf"{words}(?![\w])", own, hint)
    return DataError(error.message, hint)


def _choose_for_file(data_sets: Sequence[HFDatasetConfig], first: dict[str, Any], source: str) -> RowFormat:
    """Return how the run would read the row: as those of its first data set that can be read like it."""
    for settings in data_sets[:-1]:
        with suppress(DataError):
            return choose_format(settings, first, source)
    return choose_format(data_sets[-1], first, source)

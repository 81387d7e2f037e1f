"""The data of a run, prepared once: split, tokenized, labelled, packed, memory-mapped.

A prepared data set is one folder: `training.jsonl`, `validation.jsonl` and `test.jsonl`, `split.json` that
says they are whole, and `tokens-…` for each tokenizer and length they were prepared for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.config import TrainConfig
from tunesmith.data.encode import RowError, tokenizer_content
from tunesmith.data.end_tokens import find_end_tokens
from tunesmith.data.fit import Limits, choose_limits
from tunesmith.data.folder import DataFolder, open_folder
from tunesmith.data.formats import RowFormat
from tunesmith.data.formats.base import LEFT_OUT, UNRENDERED_HINT
from tunesmith.data.shares import check_drawn, describe_shares
from tunesmith.data.sources import describe_doubles, describe_files, describe_source, sources_fingerprint
from tunesmith.data.split import SETS, SplitCounts, check_sources, locate, write_split
from tunesmith.data.summary import count, log_long
from tunesmith.data.token_arrays import SetStats, write_arrays
from tunesmith.data.token_files import write_tokens
from tunesmith.data.token_set import TokenSet, open_set
from tunesmith.errors import DataError
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import recorded_date

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Raised whenever the same rows, settings and tokenizer give other texts or tokens than before.
RENDERING_VERSION = 3
_TOKENS_MANIFEST = "manifest.json"

T = TypeVar("T")


@dataclass(frozen=True)
class PrepareStats:
    """The stats of the sets that are tokenized, and the rows kept for the test set.

    `overlap` tells of a set whose rows may be in the training set too how many are; `notes` are what the log says.
    """

    train: SetStats
    validation: SetStats | None
    test_rows: int
    overlap: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared data set.

    `source` is a digest of the rows' origin, `fingerprint` (16 hex digits) of everything that shapes the set.
    `row_format` is the name of the rows' format, of several data sets a list of them. `date` (ISO) is the day that
    the texts name, None where they name none. `end_tokens` are those that a training on it teaches, the commonest
    first; None until they are looked for.
    """

    folder: Path
    data_dir: Path
    source: str
    fingerprint: str
    row_format: str | list[str]
    rendering_version: int
    date: str | None
    train: TokenSet
    validation: TokenSet | None
    stats: PrepareStats
    end_tokens: tuple[int, ...] | None = None


def prepare(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, datasets_dir: Path, date: str | None = None
) -> Prepared:
    """Prepare the data of `config`, or find it prepared, under `config.data_dir` or else `datasets_dir`.

    `date` (ISO) is the day on which conversations are held, where the chat template asks for it; None: today.

    Atomic: another process sees the whole or nothing, an error leaves nothing behind, and of two that
    prepare at once the second waits for the first.

    Raises:
        ConfigError: a malformed template, or examples that can't be cut.
        DataError: the data set is absent or malformed, holds nothing to train on, or can't be written.
        ModelError: the tokenizer can't be trained with.
        LockError: the disk has no locks.
    """
    formats = check_sources(config)
    for line in describe_formats(config, formats):
        logger.info(line)
    warnings = [line for row_format in formats for line in row_format.warnings()]
    for line in [*warnings, *describe_doubles(config.data_sets)]:
        logger.warning(line)
    limits = choose_limits(config, formats)
    date = date or recorded_date(None)
    formats = [row_format.with_tokenizer(tokenizer, date) for row_format in formats]
    settings = _split_settings(config, formats)
    split_fingerprint = _digest(settings)
    shaping = [split_fingerprint, tokenizer_content(tokenizer), *_length_settings(config)]
    fingerprint = _digest([*shaping, *_date_of(formats).values()])
    path = config.data_dir or datasets_dir / split_fingerprint
    moved_by = "data_dir" if config.data_dir else "home"
    with open_folder(path.expanduser().absolute(), settings, moved_by) as folder:
        tokens = folder.path / f"tokens-{fingerprint}"
        if not (folder.has_split and _is_whole(tokens)):
            # A machine that was lost may have left the folder without its content.
            shutil.rmtree(tokens, ignore_errors=True)
            with folder.staging():
                _fill(folder, config, formats, limits, fingerprint)
    prepared = _with_ends(open_prepared(tokens), config, tokenizer)
    check_drawn(prepared.train, config.data_sets)
    _check_unrendered(prepared, config)
    _log(prepared, config)
    return prepared


def _check_unrendered(prepared: Prepared, config: TrainConfig) -> None:
    """Refuse what another command has prepared and counted."""
    left_out = [what for what in prepared.stats.train.findings if what.startswith(LEFT_OUT)]
    if left_out and all(it.unrendered == "refuse" for it in config.sources):
        raise DataError(f"the training set has {left_out[0]}", UNRENDERED_HINT)


def prepare_run(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, run: RunDir) -> Prepared:
    """Prepare the data of a run as `prepare` does; a run that goes on keeps the tokens that it began with.

    Raises:
        DataError: besides, those are gone, and this version would render the rows otherwise.
    """
    if not keeps_tokens(run):
        recorded = run.read_params()["data"] if run.params_path.exists() else {}
        return prepare(config, tokenizer, run.datasets_path, recorded.get("date"))
    params = run.read_params()
    version, tokens = rendering_version_of(params), Path(params["data"]["folder"])
    # The home may be mounted elsewhere by now.
    for folder in (tokens, run.datasets_path / tokens.parent.name / tokens.name):
        if _is_whole(folder):
            logger.info("the run keeps the tokens that it began with, of rendering %d", version)
            return _with_ends(open_prepared(folder), config, tokenizer)
    raise DataError(
        f"the prepared data of this run, `{tokens}`, are gone, and this version would render their rows otherwise "
        f"(rendering {RENDERING_VERSION}; the run's is {version})",
        "restore the folder, or give another --run_name for a new run",
    )


def _with_ends(prepared: Prepared, config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Prepared:
    return replace(
        prepared, end_tokens=find_end_tokens(prepared.train.path, tokenizer, config.max_seq_length)
    )


def rendering_version_of(params: Mapping[str, Any]) -> int:
    """Return the version by which the rows of a run became text, of its `params.json`."""
    return int(params["data"].get("rendering_version", 1))


def keeps_tokens(run: RunDir) -> bool:
    """Tell whether the run was begun with another rendering, so that it goes on with the tokens that it has."""
    return run.params_path.exists() and rendering_version_of(run.read_params()) != RENDERING_VERSION


def describe_formats(config: TrainConfig, formats: Sequence[RowFormat]) -> list[str]:
    """Return which files of each data set are read, and how their rows are, and why."""
    lines = []
    for settings, row_format in zip(config.sources, formats, strict=True):
        lines += describe_files(settings)
        name = "" if settings.name is None else f"{settings.name}, "
        lines.append(
            f"{name}{describe_source(settings)}: rows are read as {row_format.name}, because {row_format.why}"
        )
    return lines


def _date_of(formats: Sequence[RowFormat]) -> dict[str, str]:
    """Return the day that the texts name, by the name it is recorded under, if they name one."""
    dates = [row_format.date for row_format in formats if row_format.date is not None]
    return {"date": dates[0]} if dates else {}


def _split_settings(config: TrainConfig, formats: Sequence[RowFormat]) -> dict[str, Any]:
    """What the three sets follow from, by the names that an error calls them."""
    data_sets, own_sets = config.data_sets, [[own.number, own.part] for own in config.own_sets]
    return {
        "format_version": FORMAT_VERSION,
        **_rendering(),
        "dataset_name": sources_fingerprint(config.sources),
        "templates and field_mapping": _one_or_all([row_format.identity() for row_format in formats]),
        "train_split_ratio": _one_or_all([it.train_split_ratio for it in data_sets]),
        "val_test_split_ratio": _one_or_all([it.val_test_split_ratio for it in data_sets]),
        "seed": config.seed,
        **({"validation_dataset and test_dataset": own_sets} if own_sets else {}),
        **_where_chosen("max_rows", [it.max_rows for it in data_sets], None),
        **_where_chosen("group_by", [it.group_by for it in data_sets], None),
    }


def _length_settings(config: TrainConfig) -> list[Any]:
    # What the first versions didn't have isn't told at its default, so that what they have prepared is found.
    newer = {name: getattr(config, name) for name in ("long_text", "long_examples", "concatenate")}
    chosen = {name: value for name, value in newer.items() if value != TrainConfig.model_fields[name].default}
    return [config.max_seq_length, *([chosen] if chosen else [])]


def _where_chosen(name: str, values: list[T], default: T) -> dict[str, Any]:
    """Return what the data sets have in place of a default; nothing if all leave it, as before there was a choice."""
    return {} if all(value == default for value in values) else {name: _one_or_all(values)}


def _rendering() -> dict[str, int]:
    # The first version isn't told, so that what it has prepared is found.
    return {"rendering_version": RENDERING_VERSION} if RENDERING_VERSION > 1 else {}


def _one_or_all(values: list[T]) -> T | list[T]:
    """Return how the values of the data sets are recorded: a single one by itself."""
    return values[0] if len(values) == 1 else values


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _fill(
    folder: DataFolder,
    config: TrainConfig,
    formats: Sequence[RowFormat],
    limits: Limits,
    fingerprint: str,
) -> None:
    """Write what the folder lacks into its staging, and publish it."""
    if folder.has_split:
        rows_dir, split = folder.path, SplitCounts.read(folder.read_details())
    else:
        rows_dir, split = folder.staged, write_split(config, formats, folder.staged)
    row_counts = split.rows
    tokens = folder.staged / f"tokens-{fingerprint}"
    tokens.mkdir()
    num_segments = formats[0].num_segments
    stats: dict[str, SetStats] = {}
    for name in ("training", "validation"):
        rows_file = rows_dir / f"{name}.jsonl"
        try:
            counts = write_tokens(rows_file, tokens / f"{name}.arrow", formats, limits, config.num_proc)
        except RowError as error:
            raise _at_source(error, rows_file, config, formats) from error
        stats[name] = write_arrays(tokens, name, row_counts[name], counts, config, num_segments)
    if not stats["training"].examples:
        raise _nothing_to_train(stats["training"], config)
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": folder.settings["dataset_name"],
        "fingerprint": fingerprint,
        **_rendering(),
        "row_format": _one_or_all([row_format.name for row_format in formats]),
        **_date_of(formats),
        "test_rows": row_counts["test"],
        **split.told,
        "stats": {name: asdict(value) for name, value in stats.items()},
    }
    (tokens / _TOKENS_MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    folder.publish(None if folder.has_split else {"rows": row_counts, **split.told}, SETS, tokens)


def _at_source(
    error: RowError, rows_file: Path, config: TrainConfig, formats: Sequence[RowFormat]
) -> DataError:
    with rows_file.open("rb") as stream:
        line = next(line for index, line in enumerate(stream) if index == error.index)
    return DataError(f"{locate(config, formats, json.loads(line))}: {error.message}", error.hint)


def _nothing_to_train(stats: SetStats, config: TrainConfig) -> DataError:
    source = " and ".join(map(describe_source, config.data_sets))
    if stats.untrained == stats.dropped:
        return DataError(
            f"no token of {source} would be trained: none of its {stats.rows:,} rows has a completion",
            "check output_template and field_mapping, or that the conversations have assistant messages "
            "(role_names tells what the rows call them)",
        )
    if stats.over_long:
        return DataError(
            f"no token of {source} would be trained: its examples are longer than max_seq_length "
            f"({config.max_seq_length}), and long_examples is drop",
            "raise max_seq_length, or set long_examples truncate",
        )
    return DataError(
        f"no token of {source} would be trained: its prompts alone fill max_seq_length ({config.max_seq_length})",
        "raise max_seq_length, or shorten input_template",
    )


def _is_whole(tokens: Path) -> bool:
    try:
        json.loads((tokens / _TOKENS_MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def open_prepared(folder: Path) -> Prepared:
    """Open the `tokens-…` folder of a prepared data set. Maps its files, reads none.

    Raises:
        DataError: the folder is absent, or of a newer version.
    """
    try:
        manifest = json.loads((folder / _TOKENS_MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"no prepared data at `{folder}`", "start the run again to prepare them") from error
    if manifest["format_version"] > FORMAT_VERSION:
        raise DataError(
            f"the prepared data at `{folder}` have format {manifest['format_version']}; this version knows "
            f"{FORMAT_VERSION}",
            "install a newer tunesmith, or remove the folder to prepare them again",
        )
    stats = {name: SetStats(**values) for name, values in manifest["stats"].items()}
    held_out = stats["validation"].examples > 0
    return Prepared(
        folder=folder,
        data_dir=folder.parent,
        source=manifest["source"],
        fingerprint=manifest["fingerprint"],
        row_format=manifest["row_format"],
        rendering_version=manifest.get("rendering_version", 1),
        date=manifest.get("date"),
        train=open_set(folder, "training"),
        validation=open_set(folder, "validation") if held_out else None,
        stats=PrepareStats(
            stats["training"],
            stats["validation"] if held_out else None,
            manifest["test_rows"],
            manifest.get("overlap", {}),
            manifest.get("notes", []),
        ),
    )


def _log(prepared: Prepared, config: TrainConfig) -> None:
    train, validation = prepared.stats.train, prepared.stats.validation
    sequences = f"{train.examples:,} padded sequences"
    if config.packing:
        sequences = f"{count(train.packs, 'pack')} of {config.max_seq_length} tokens, {100 * train.packing_efficiency:.1f} % full"
    logger.info(
        "%s training, %s validation and %s test rows in %s; %s tokens, %.1f %% trained; "
        "%s; %s truncated, %s dropped",
        f"{train.rows:,}",
        f"{validation.rows if validation else 0:,}",
        f"{prepared.stats.test_rows:,}",
        prepared.data_dir,
        f"{train.tokens:,}",
        100 * train.trained_tokens / train.tokens,
        sequences,
        f"{train.truncated:,}",
        f"{train.dropped:,}",
    )
    for what, number in train.findings.items():
        logger.warning("training set: %s %s", f"{number:,}", what)
    log_long(train, config)
    for line in [*prepared.stats.notes, *describe_shares(prepared.train, config.data_sets)]:
        logger.info(line)
    for name, num_shared in prepared.stats.overlap.items():
        num_rows = prepared.stats.test_rows if name == "test" else validation.rows if validation else 0
        if num_shared:
            logger.warning(
                "%s of the %s %s rows are in the training set too: they tell what was memorised, not what was learned",
                f"{num_shared:,}",
                f"{num_rows:,}",
                name,
            )
        elif num_rows:
            logger.info("none of the %s %s rows is in the training set", f"{num_rows:,}", name)
    if train.untrained * 2 > train.rows:
        logger.warning(
            "%s of the %s training rows have nothing to train: is the right column named, and is it filled?",
            f"{train.untrained:,}",
            f"{train.rows:,}",
        )
    if validation is None and any(it.train_split_ratio < 1 for it in config.data_sets):
        logger.warning(
            "no row is left for validation (equal rows, and those of a group, stay on one side): no evaluation, no early stopping"
        )

"""The data of a run, prepared once: split, tokenized, labelled, packed, memory-mapped.

A prepared data set is one folder: `training.jsonl`, `validation.jsonl` and `test.jsonl`, `split.json` that
says they are whole, and `tokens-…` for each tokenizer and length they were prepared for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tunesmith.config import TrainConfig
from tunesmith.data.encode import Encoder, RowError, check_tokenizer, tokenizer_content
from tunesmith.data.folder import DataFolder, open_folder
from tunesmith.data.packing import pack_examples
from tunesmith.data.sources import describe_source, source_fingerprint
from tunesmith.data.split import SETS, check_source, locate, write_split
from tunesmith.data.templates import Kind, RowFormat
from tunesmith.data.token_files import Counts, write_tokens
from tunesmith.data.token_set import TokenSet, open_set
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_TOKENS_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SetStats:
    """What became of one set's rows. Lengths and totals are in tokens.

    `truncated` examples were cut at the right; `dropped` rows or examples don't train, of them `untrained`
    because they hold no completion at all. `packing_efficiency` is the share of the packs that is filled.
    """

    rows: int
    examples: int
    truncated: int
    dropped: int
    untrained: int
    tokens: int
    trained_tokens: int
    packs: int
    packing_efficiency: float
    longest: int


@dataclass(frozen=True)
class PrepareStats:
    """The stats of the sets that are tokenized, and the rows kept for the test set."""

    train: SetStats
    validation: SetStats | None
    test_rows: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared data set.

    `source` is a digest of the rows' origin, `fingerprint` (16 hex digits) of everything that shapes the set.
    """

    folder: Path
    data_dir: Path
    source: str
    fingerprint: str
    row_format: Kind
    train: TokenSet
    validation: TokenSet | None
    stats: PrepareStats


def prepare(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, datasets_dir: Path) -> Prepared:
    """Prepare the data of `config`, or find it prepared, under `config.data_dir` or else `datasets_dir`.

    Atomic: another process sees the whole or nothing, an error leaves nothing behind, and of two that
    prepare at once the second waits for the first.

    Raises:
        ConfigError: a malformed template.
        DataError: the data set is absent or malformed, holds nothing to train on, or can't be written.
        ModelError: the tokenizer can't be trained with.
    """
    row_format = check_source(config)
    logger.info("%s: rows are read as %s, because %s", row_format.source, row_format.kind, row_format.why)
    check_tokenizer(tokenizer, row_format.kind)
    settings = _split_settings(config, row_format)
    split_fingerprint = _digest(settings)
    fingerprint = _digest([split_fingerprint, tokenizer_content(tokenizer), config.max_seq_length])
    path = config.data_dir or datasets_dir / split_fingerprint
    with open_folder(path.expanduser().absolute(), settings) as folder:
        tokens = folder.path / f"tokens-{fingerprint}"
        if not (folder.has_split and _is_whole(tokens)):
            # A machine that was lost may have left the folder without its content.
            shutil.rmtree(tokens, ignore_errors=True)
            with folder.staging():
                _fill(folder, config, row_format, tokenizer, fingerprint)
    prepared = open_prepared(tokens)
    _log(prepared, config)
    return prepared


def _split_settings(config: TrainConfig, row_format: RowFormat) -> dict[str, Any]:
    """What the three sets follow from, by the names that an error calls them."""
    return {
        "format_version": FORMAT_VERSION,
        "dataset_name": source_fingerprint(config),
        "templates and field_mapping": row_format.identity(),
        "train_split_ratio": config.train_split_ratio,
        "val_test_split_ratio": config.val_test_split_ratio,
        "seed": config.seed,
    }


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _fill(
    folder: DataFolder,
    config: TrainConfig,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerFast,
    fingerprint: str,
) -> None:
    """Write what the folder lacks into its staging, and publish it."""
    if folder.has_split:
        rows_dir, row_counts = folder.path, folder.row_counts()
    else:
        rows_dir, row_counts = folder.staged, write_split(config, row_format, folder.staged)
    tokens = folder.staged / f"tokens-{fingerprint}"
    tokens.mkdir()
    encoder = Encoder(tokenizer, row_format.kind)
    stats: dict[str, SetStats] = {}
    for name in ("training", "validation"):
        rows_file = rows_dir / f"{name}.jsonl"
        try:
            counts = write_tokens(
                rows_file,
                tokens / f"{name}.arrow",
                tokenizer,
                encoder,
                config.max_seq_length,
                config.num_proc,
            )
        except RowError as error:
            raise _at_source(error, rows_file, config, row_format) from error
        stats[name] = _write_arrays(tokens, name, row_counts[name], counts, config)
    if not stats["training"].examples:
        raise _nothing_to_train(stats["training"], config)
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": folder.settings["dataset_name"],
        "fingerprint": fingerprint,
        "row_format": row_format.kind,
        "test_rows": row_counts["test"],
        "stats": {name: asdict(value) for name, value in stats.items()},
    }
    (tokens / _TOKENS_MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    folder.publish(None if folder.has_split else row_counts, SETS, tokens)


def _at_source(error: RowError, rows_file: Path, config: TrainConfig, row_format: RowFormat) -> DataError:
    with rows_file.open("rb") as stream:
        line = next(line for index, line in enumerate(stream) if index == error.index)
    return DataError(f"{locate(config, row_format, json.loads(line))}: {error.message}", error.hint)


def _nothing_to_train(stats: SetStats, config: TrainConfig) -> DataError:
    source = describe_source(config)
    if stats.untrained == stats.dropped:
        return DataError(
            f"no token of {source} would be trained: none of its {stats.rows:,} rows has a completion",
            "check output_template and field_mapping, or that the conversations have assistant messages",
        )
    return DataError(
        f"no token of {source} would be trained: its prompts alone fill max_seq_length ({config.max_seq_length})",
        "raise max_seq_length, or shorten input_template",
    )


def _write_arrays(tokens: Path, name: str, num_rows: int, counts: Counts, config: TrainConfig) -> SetStats:
    """Write the per-example arrays and the packs of one set beside its Arrow file."""
    lengths, num_trained = _write_examples(tokens, name)
    examples, bounds = pack_examples(lengths, config.max_seq_length, config.seed)
    _save(tokens, name, {"pack_examples": examples, "pack_bounds": bounds})
    total = int(lengths.sum(dtype=np.int64))
    return SetStats(
        rows=num_rows,
        examples=len(lengths),
        truncated=counts.truncated,
        dropped=counts.dropped,
        untrained=counts.untrained,
        tokens=total,
        trained_tokens=num_trained,
        packs=len(bounds),
        packing_efficiency=total / (len(bounds) * config.max_seq_length) if len(bounds) else 0.0,
        longest=int(lengths.max(initial=0)),
    )


def _write_examples(tokens: Path, name: str) -> tuple[np.ndarray, int]:
    """Write the per-example arrays; return the lengths and the number of trained tokens. Holds 16 bytes an example."""
    lengths, rows, num_trained = array("i"), array("q"), array("i")
    # Read rather than mapped: mapped pages would count as this process's memory.
    with pa.OSFile(str(tokens / f"{name}.arrow")) as source, pa.ipc.open_file(source) as reader:
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            offsets = batch[0].offsets.to_numpy()
            trained = batch[1].values.to_numpy(zero_copy_only=False)
            lengths.frombytes(np.diff(offsets).tobytes())
            rows.frombytes(batch[2].to_numpy().tobytes())
            num_trained.frombytes(np.add.reduceat(trained, offsets[:-1], dtype=np.int32).tobytes())
    columns = {"lengths": lengths, "rows": rows, "num_trained": num_trained}
    arrays = {key: np.frombuffer(column, dtype=column.typecode) for key, column in columns.items()}
    _save(tokens, name, arrays)
    return arrays["lengths"], int(arrays["num_trained"].sum(dtype=np.int64))


def _save(tokens: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    for array_name, values in arrays.items():
        np.save(tokens / f"{name}-{array_name}.npy", values)


def _is_whole(tokens: Path) -> bool:
    try:
        json.loads((tokens / _TOKENS_MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def open_prepared(folder: Path) -> Prepared:
    """Open the `tokens-…` folder of a prepared data set. Maps its files, reads none.

    Raises:
        DataError: the folder is absent, or of a newer version.
    """
    try:
        manifest = json.loads((folder / _TOKENS_MANIFEST).read_text())
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
        train=open_set(folder, "training"),
        validation=open_set(folder, "validation") if held_out else None,
        stats=PrepareStats(
            stats["training"], stats["validation"] if held_out else None, manifest["test_rows"]
        ),
    )


def _log(prepared: Prepared, config: TrainConfig) -> None:
    train, validation = prepared.stats.train, prepared.stats.validation
    sequences = f"{train.examples:,} padded sequences"
    if config.packing:
        packs = "1 pack" if train.packs == 1 else f"{train.packs:,} packs"
        sequences = f"{packs} of {config.max_seq_length} tokens, {100 * train.packing_efficiency:.1f} % full"
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
    if validation is None and config.train_split_ratio < 1:
        logger.warning(
            "no row is left for validation (equal rows stay on one side): no evaluation, no early stopping"
        )

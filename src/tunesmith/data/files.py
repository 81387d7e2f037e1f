"""Rows from JSON, CSV and Parquet files. Each reader streams, and names the place of what is malformed."""

from __future__ import annotations

from pathlib import Path

from tunesmith.data.arrow_rows import Rows, iterate_rows
from tunesmith.data.content import kind_of
from tunesmith.data.csv_rows import read_csv
from tunesmith.data.gaps import find_gapped, float_columns, without_points
from tunesmith.data.json_rows import read_json
from tunesmith.data.packed import open_file
from tunesmith.errors import DataError

BATCH_ROWS = 1000


def read_file(file: Path, split: str) -> Rows:
    """Yield the rows of a file; of one that holds several splits, those of `split`.

    Raises:
        DataError: it isn't what its name says and nothing that can be read, or is malformed.
    """
    kind = kind_of(file)
    if kind == "JSON":
        return read_json(file, split)
    return read_csv(file) if kind == "CSV" else _read_parquet(file)


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    count = 0
    try:
        with open_file(file) as stream, parquet.ParquetFile(stream) as reader:
            names = reader.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(
                    f"`{file}` has the column `{twice[0]}` twice", "give each column a name of its own"
                )
            floats = float_columns(reader.schema_arrow)
            columns = reader.iter_batches(BATCH_ROWS, columns=floats) if floats else ()
            gapped = find_gapped(columns, f"`{file}`")
            for batch in reader.iter_batches(BATCH_ROWS):
                for row in without_points(iterate_rows(batch), gapped):
                    count += 1
                    yield f"`{file}`, row {count}", row
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:  # of a struct that has a key twice, the second
        raise DataError(
            f"`{file}` is not a valid Parquet file: {str(error).splitlines()[0]}", "write the file again"
        ) from error

"""Rows from Arrow tables, without what Arrow's columns put into them.

A column of objects has every key of any of its objects: those that an object lacks come back as nulls. Objects that
are too different are kept as JSON text, and narrow floats come back with the digits that widening gave them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]


def iterate_rows(table: pyarrow.Table | pyarrow.RecordBatch) -> Iterator[Row]:
    """Yield the rows of a table as they were before Arrow held them."""
    changed = {field.name: field.type for field in table.schema if _changes(field.type)}
    for row in table.to_pylist():
        for name, kind in changed.items():
            row[name] = _restore(row[name], kind, is_inner=False)
        yield row


def _changes(kind: pyarrow.DataType) -> bool:
    import pyarrow

    is_narrow = pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind)
    return is_narrow or pyarrow.types.is_nested(kind) or isinstance(kind, pyarrow.JsonType)


def _restore(value: Any, kind: pyarrow.DataType, is_inner: bool) -> Any:
    """Return the value as it was; nulls of an outermost object stay, as whoever reads it knows its keys."""
    import numpy as np
    import pyarrow

    if value is None or not _changes(kind):
        return value
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if pyarrow.types.is_floating(kind):
        # The shortest digits that mean this float.
        return float(str(np.float32(value) if pyarrow.types.is_float32(kind) else np.float16(value)))
    if pyarrow.types.is_struct(kind):
        of_key = {field.name: field.type for field in kind}
        return {
            key: _restore(held, of_key[key], is_inner=True)
            for key, held in value.items()
            if held is not None or not is_inner
        }
    if pyarrow.types.is_map(kind):
        # With other keys than text it is no object.
        pairs = [(key, _restore(held, kind.item_type, is_inner=True)) for key, held in value]
        return dict(pairs) if all(isinstance(key, str) for key, _ in pairs) else pairs
    if isinstance(value, list):
        return [_restore(held, kind.value_type, is_inner) for held in value]
    return value

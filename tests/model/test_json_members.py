"""One member of a JSON text changes, and every other byte stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.errors import ModelError
from tunesmith.model.files.json_members import set_member, write_member

TEXTS = (
    '{"a": 1, "x": [1, 2], "b": {"x": 3}}',
    '{\n    "x" : "old \\" } , ",\r\n    "z":1.50\n}\n',
    '{"x": null}',
    '  {\n"b": "x",\n"x":\n{"y": "}"}  }  \n',
    "{}",
    "{ }\n",
    '{"b": 1}',
    '{\n  "b": [1,\n   2]\n}',
    '{"x": 1, "x": 2, "b": 3}',
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("value", [[2, 0], 'with "quotes"\nand lines', None])
def test_one_member_is_set(text: str, value: object) -> None:
    changed = set_member(text, "x", value)
    assert json.loads(changed) == {**json.loads(text), "x": value}
    assert list(json.loads(changed)) == list({**json.loads(text), "x": value})
    assert set_member(changed, "x", value) == changed


def test_all_other_bytes_stay(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes('{\r\n\t"é": 1e3,\r\n\t"x": 1,\r\n\t"ü": "\\u00fc"}\r\n'.encode())
    write_member(path, "x", "ß")
    assert path.read_bytes() == '{\r\n\t"é": 1e3,\r\n\t"x": "ß",\r\n\t"ü": "\\u00fc"}\r\n'.encode()


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": ', b"\xff"])
def test_what_is_no_object_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"file\.json"):
        write_member(tmp_path / "file.json", "x", 1)

"""A tokenizer that brings its own code tokenizes in several processes as it does in one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from support.tokenizers import build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.data.fit import Limits
from tunesmith.data.formats.text import TextFormat
from tunesmith.data.token_files import write_tokens
from tunesmith.errors import MISSING_PACKAGE_HINT, ModelError
from tunesmith.model.load import load_tokenizer

OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a tokenizer that brings its code."""
    folder = tmp_path / "own"
    build_tokenizer("byte_bpe").save_pretrained(folder)
    (folder / "tokenization_own.py").write_text(OWN_TOKENIZER)
    path = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    content = {**json.loads(path.read_text()), "auto_map": auto_map, "tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps(content))
    return folder


def test_several_processes_find_the_tokenizer_s_class(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(ModelRef(own, trust_remote_code=True), own)
    assert type(tokenizer).__module__.startswith("transformers_modules.")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": "", "output": f"row {i}"}) + "\n" for i in range(40)))
    formats = [TextFormat("it is text").with_tokenizer(tokenizer, "2026-01-01")]
    limits = Limits(32, ["truncate"])

    monkeypatch.setattr("tunesmith.data.token_files._ROWS_PER_PROCESS", 20)
    write_tokens(rows, tmp_path / "one.arrow", formats, limits, num_proc=1)
    write_tokens(rows, tmp_path / "two.arrow", formats, limits, num_proc=2)

    one, two = (
        pa.ipc.open_file(pa.memory_map(str(tmp_path / name))).read_all()
        for name in ("one.arrow", "two.arrow")
    )
    assert one.num_rows == 40
    assert one.equals(two)


def test_a_package_that_its_code_lacks_is_named(own: Path) -> None:
    (own / "tokenization_own.py").write_text(f"import package_that_lacks\n{OWN_TOKENIZER}")

    with pytest.raises(ModelError, match="package_that_lacks") as raised:
        load_tokenizer(ModelRef(own, trust_remote_code=True), own)

    assert raised.value.hint == MISSING_PACKAGE_HINT

"""Data sets at hf:// addresses, from a hub of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.hub import serve_hub

# The hub's address is read as the package is imported.
READING = """
import sys
from pathlib import Path
from tunesmith.config import HFDatasetConfig
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError
from tunesmith.remote.copies import copies_in

for url in sys.argv[2:]:
    with copies_in(Path(sys.argv[1])):
        try:
            print([row["text"] for _, row in read_rows(HFDatasetConfig(dataset_name=url))])
        except DataError as error:
            print(error.message)
"""


def test_a_file_and_a_folder_of_the_hub_are_fetched_once_and_what_is_absent_is_told(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "org" / "name"
    repository.mkdir(parents=True)
    (repository / "train.jsonl").write_text('{"text": "one"}\n')
    (repository / "test.jsonl").write_text('{"text": "two"}\n')
    folder = "hf://datasets/org/name"
    urls = [
        f"{folder}/train.jsonl",
        f"{folder}/train.jsonl",
        folder,
        f"{folder}/no.jsonl",
        "hf://datasets/org/no/x.jsonl",
    ]
    with serve_hub(tmp_path / "hub") as (address, sent):
        environ = {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", READING, str(tmp_path / "home"), *urls],
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    one = "['one']"
    absent = [line.split(" (")[0] for line in done.stdout.splitlines()[3:]]
    assert done.stdout.splitlines()[:3] == [one, one, one]
    assert absent == [f"there is nothing at `{url}`" for url in urls[3:]]
    assert sorted(sent) == ["test.jsonl", "train.jsonl", "train.jsonl"]

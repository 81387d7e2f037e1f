"""Models and data sets of the hub, by name and revision, and models that bring their own code.

Each loads in a process of its own: the hub's libraries read their environment once.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from support.commands import run_python
from support.own_code import REMOTE_MODEL
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.load import load_model_config

pytestmark = pytest.mark.slow


LOAD_FROM_HUB = """
import json
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.files.fingerprint import model_fingerprint
from tunesmith.model.load import load_model_config, load_tokenizer
loaded = {}
for revision in (None, "v2", "2" * 40, "v3"):
    ref = ModelRef("org/tiny", revision)
    try:
        model_config = load_model_config(ref)
        load_tokenizer(ref)
        loaded[str(revision)] = [model_config.hidden_size, model_fingerprint(ref)]
    except ModelError as error:
        loaded[str(revision)] = error.message
print(json.dumps(loaded))
"""


def test_a_model_of_the_hub_is_loaded_at_its_revision(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--tiny"
    for digit, hidden_size, name in (("1", 32, "main"), ("2", 64, "v2")):
        save_model(
            cache / "snapshots" / (digit * 40), build_tokenizer("byte_bpe"), "llama", hidden_size=hidden_size
        )
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(digit * 40)
    loaded = run_python(LOAD_FROM_HUB, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert loaded["None"] == [32, "1" * 40]
    assert loaded["v2"] == loaded["2" * 40] == [64, "2" * 40]
    assert "can't load the" in loaded["v3"]
    assert "`org/tiny`" in loaded["v3"]


LOAD_REMOTE = """
import json, sys
from pathlib import Path
import torch
from tunesmith.config import ModelRef
from tunesmith.model.load import load_model, load_model_config
ref = ModelRef(Path(sys.argv[1]), trust_remote_code=True)
model = load_model(ref, torch.device("cpu"), torch.float32)
names = [type(load_model_config(ref)).__name__, type(model).__name__]
print(json.dumps(names))
"""


def test_a_model_s_own_code_runs_only_when_it_is_trusted(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_of("llama"), tmp_path / "own")
    content = json.loads((folder / "config.json").read_text())
    content |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own.py").write_text(REMOTE_MODEL)
    with pytest.raises(ModelError, match="can't load the config") as error:
        load_model_config(ModelRef(folder))
    assert "--trust_remote_code" in str(error.value.hint)
    assert run_python(LOAD_REMOTE, folder, HF_HOME=str(tmp_path)) == ["OwnConfig", "OwnForCausalLM"]


READ_CONFIGURATIONS = """
import json, os, sys
import datasets
for name in ("first", "second"):
    datasets.load_dataset("cached", name)  # from the folder of that name: fills the cache
os.chdir(sys.argv[1])
from tunesmith.config import TrainConfig
from tunesmith.data.sources import read_rows
print(json.dumps({
    name: [row for _, row in read_rows(TrainConfig(dataset_name="cached", dataset_config=name))]
    for name in ("first", "second")
}))
"""


def test_a_configuration_of_a_hub_data_set_is_read(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "cached", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("first", "second"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("first", "second"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    read = run_python(
        READ_CONFIGURATIONS, elsewhere, cwd=tmp_path, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"
    )
    assert read == {"first": [{"text": "first"}], "second": [{"text": "second"}]}


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that has nothing: its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


ASK_HUB = """
import json
from tunesmith.config import TrainConfig
from tunesmith.data.sources import source_fingerprint
from tunesmith.errors import DataError
try:
    source_fingerprint(TrainConfig(dataset_name="org/rows", dataset_revision="v7"))
except DataError as error:
    print(json.dumps([error.message, error.hint]))
"""


def test_a_hub_data_set_is_asked_for_at_its_revision(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    message, hint = run_python(ASK_HUB, HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert any("org/rows" in path and "v7" in path for path in asked), asked
    assert "org/rows" in message
    assert "revision v7" in hint

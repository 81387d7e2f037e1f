"""Data sets and models in S3, from a real server of its protocol: fetched once, recorded without a secret."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed: `make test-remote` installs it")
pytest.importorskip("moto", reason="moto is not installed: `make test-remote` installs it")

from support.commands import Command
from support.helm import helm
from support.runs import losses, small_config, train_here, write_rows
from support.s3 import CREDENTIALS, Bucket, serve_bucket
from tunesmith.chart.places import check_addresses
from tunesmith.chart.release import Release, render
from tunesmith.config import EvaluateConfig, HFDatasetConfig, TrainConfig
from tunesmith.data.prepare import prepare_run
from tunesmith.data.sources import describe_source, read_rows, source_fingerprint
from tunesmith.errors import DataError, ModelError, RunError
from tunesmith.export.card import write_card
from tunesmith.model.files.fetched import with_model_here
from tunesmith.model.load import load_tokenizer
from tunesmith.remote.copies import copies_in
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import locate_run
from tunesmith.runs.tuned import find_tuned
from tunesmith.train.start import check_resumable, record_params
from tunesmith.train.worker import TrainJob
from tunesmith.view.inspect import inspect

pytestmark = [pytest.mark.slow, pytest.mark.remote]

ModelOf = Callable[[str], Path]

ROWS = [{"text": "one"}, {"text": "two"}]
BODY = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with serve_bucket("rows") as bucket:
        yield bucket


@pytest.fixture
def without_credentials(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)


def read(url: str, home: Path, split: str = "train") -> list[dict[str, object]]:
    """Read the rows as a process of its own does."""
    with copies_in(home):
        return [row for _, row in read_rows(HFDatasetConfig(dataset_name=url, split=split))]


def test_a_file_gives_its_rows_and_is_the_same_as_on_the_disk(bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.put("one/train.jsonl", BODY)
    (tmp_path / "train.jsonl").write_bytes(BODY)
    config = HFDatasetConfig(dataset_name=url)
    with copies_in(tmp_path / "home"):
        assert [row for _, row in read_rows(config)] == ROWS
        assert describe_source(config) == "`train.jsonl` (train)"
        local = HFDatasetConfig(dataset_name=str(tmp_path / "train.jsonl"))
        assert source_fingerprint(config) == source_fingerprint(local)


def test_a_folder_gives_the_files_of_the_split(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("folder/train.jsonl", BODY)
    bucket.put("folder/test.jsonl", b'{"text": "test"}\n')
    bucket.put("folder/", b"")  # as consoles mark a folder
    bucket.put("folder/.hidden", b"x")
    for url in ("s3://rows/folder", "s3://rows/folder/"):
        assert read(url, tmp_path) == ROWS
        assert read(url, tmp_path, "test") == [{"text": "test"}]


def test_it_is_fetched_once_until_it_changes(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = bucket.put("changing/train.jsonl", BODY)
    with caplog.at_level(logging.INFO):
        assert read(url, tmp_path) == read(url, tmp_path) == ROWS
        assert caplog.text.count("fetching") == 1
        assert "has not changed since it was fetched" in caplog.text
        bucket.put("changing/train.jsonl", b'{"text": "new"}\n')
        assert read(url, tmp_path) == [{"text": "new"}]
    assert caplog.text.count("fetching") == 2
    assert len(list((tmp_path / "datasets").glob("fetched-*/train.jsonl"))) == 2


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://no-such-bucket/train.jsonl", "there is nothing at `.*` .The specified bucket does not exist"),
        ("s3://no-such-bucket", "there is nothing at `s3://no-such-bucket`"),
        ("s3://rows/no/such.jsonl", "there is nothing at `s3://rows/no/such.jsonl`\n"),
    ],
)
def test_a_wrong_bucket_and_a_wrong_key_are_told(url: str, said: str, bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as error:
        read(url, tmp_path)
    assert "AWS_ENDPOINT_URL" in str(error.value.hint) and "AWS_PROFILE" in str(error.value.hint)
    assert list(tmp_path.rglob("fetched-*")) == []
    with pytest.raises(DataError, match=said):
        check_addresses(TrainConfig(dataset_name=url))


@pytest.mark.usefixtures("without_credentials")
def test_without_credentials_public_rows_are_read_and_others_refused(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    public = bucket.put("public/train.jsonl", BODY, ACL="public-read")
    private = bucket.put("private/train.jsonl", BODY)
    assert read(public, tmp_path) == ROWS
    with pytest.raises(DataError, match="may not be read: there are no credentials"):
        read(private, tmp_path)
    with caplog.at_level(logging.INFO):
        check_addresses(TrainConfig(dataset_name=private))
    assert f"`{private}` is left to the job: from here, `{private}` may not be read" in caplog.text


def test_half_of_the_credentials_is_told(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match="missing: AWS_SECRET_ACCESS_KEY"):
        read("s3://rows/x.jsonl", tmp_path)


def test_a_server_out_of_reach_is_told(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(DataError, match=r"can't read `s3://rows/x.jsonl`: .*127.0.0.1:1"):
        read("s3://rows/x.jsonl", tmp_path)


def test_the_command_ends_with_one_error(bucket: Bucket, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith", "inspect", "--dataset_name=s3://no-such-bucket/x.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is nothing at `s3://no-such-bucket/x.jsonl`")
    assert "Traceback" not in done.stderr and "secret-of-the-tests" not in done.stderr


def test_inspect_fetches_no_weights(
    bucket: Bucket, model_of: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bucket.upload(model_of("llama"), "inspected/llama")
    rows = bucket.put("inspected/train.jsonl", BODY)
    inspect(TrainConfig(model_path=model, dataset_name=rows, home=tmp_path, train_split_ratio=1, num_proc=1))
    assert "2 training" not in capsys.readouterr().err
    (copy,) = (tmp_path / "models").glob("fetched-*/llama")
    assert (copy / "tokenizer.json").is_file() and not list(copy.glob("*.safetensors"))


def test_sets_of_ones_own_are_fetched_too(bucket: Bucket, model_of: ModelOf, tmp_path: Path) -> None:
    rows = [json.dumps({"question": f"{i} plus 1?", "answer": str(i + 1)}).encode() + b"\n" for i in range(9)]
    config = config_of(
        str(model_of("llama")), bucket.put("own/train.jsonl", b"".join(rows[:7])), tmp_path
    ).model_copy(update={"validation_dataset": bucket.put("own/validation.jsonl", b"".join(rows[7:]))})
    with copies_in(tmp_path):
        prepared = prepare_run(config, load_tokenizer(config.model), locate_run(config))
    assert (prepared.stats.train.rows, prepared.stats.validation.rows) == (7, 2)


def test_what_is_submitted_is_looked_at_with_the_credentials_here(
    bucket: Bucket, model_of: ModelOf, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(
        model_path=bucket.upload(model_of("llama"), "submitted/llama"),
        dataset_name=bucket.put("submitted/train.jsonl", BODY),
    )
    with caplog.at_level(logging.INFO):
        check_addresses(config)
    assert "`s3://rows/submitted/train.jsonl` is there: 1 file, 0.0 MB" in caplog.text
    assert "`s3://rows/submitted/llama` is there: " in caplog.text
    with pytest.raises(DataError, match=r"there is nothing at `s3://rows/no-set.jsonl`"):
        check_addresses(config.model_copy(update={"test_dataset": "s3://rows/no-set.jsonl"}))
    with pytest.raises(ModelError, match="there is nothing at `s3://rows/no-model`"):
        check_addresses(config.model_copy(update={"model_path": "s3://rows/no-model"}))


def test_render_asks_nobody(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helm").symlink_to(helm())
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    rendered = render(
        Release("my-run", TrainConfig(model_path="s3://no/llama", dataset_name="s3://no/x.jsonl"))
    )
    assert "s3://no/llama" in rendered and "s3://no/x.jsonl" in rendered


@pytest.fixture(scope="module")
def trained(bucket: Bucket, model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose model and rows lie in the bucket."""
    folder = tmp_path_factory.mktemp("trained")
    rows = bucket.put("trained/train.jsonl", write_rows(folder / "train.jsonl").read_bytes())
    model = bucket.upload(model_of("llama"), "trained/llama")
    return train(config_of(model, rows, folder / "home"))


def config_of(model: str, rows: str, home: Path) -> TrainConfig:
    return small_config(model, rows, home)


def train(config: TrainConfig) -> RunDir:
    """Start a run as the driver does, and train in this process."""
    run = locate_run(config)
    with copies_in(config.home):
        check_resumable(run, config)
        here = with_model_here(config)
        prepared = prepare_run(config, load_tokenizer(here.model), run)
        run.path.mkdir(parents=True, exist_ok=True)
        record_params(run, config, prepared, 1)
        return train_here(TrainJob(here, run, prepared.folder, num_threads=1))


@pytest.mark.usefixtures("alone")
def test_a_run_records_the_addresses_and_where_the_copies_lie(trained: RunDir) -> None:
    params = trained.read_params()
    assert params["settings"]["model_path"] == params["model"]["source"] == "s3://rows/trained/llama"
    assert params["settings"]["dataset_name"] == params["data"]["source"] == "s3://rows/trained/train.jsonl"
    assert Path(params["model"]["path"]).is_relative_to(trained.home / "models")
    texts = [path.read_bytes() for path in trained.home.rglob("*") if path.is_file()]
    assert not any(value.encode() in text for value in CREDENTIALS.values() for text in texts)
    assert sorted(losses(trained)) == [1, 2, 3, 4]


@pytest.mark.usefixtures("alone")
def test_the_base_model_is_the_copy_and_is_fetched_again_if_it_is_gone(
    trained: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EvaluateConfig(checkpoints_dir=str(trained.path))
    base = find_tuned(config).base
    assert base is not None and base.folder is not None and base.name == "llama"
    shutil.rmtree(base.folder.parent)
    assert find_tuned(config).base == base
    assert (base.folder / "config.json").is_file()
    write_card(find_tuned(config), "peft", "name", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "`train.jsonl`" in card and "datasets:" not in card


@pytest.mark.usefixtures("alone")
def test_a_run_goes_on_with_what_it_began_with_or_not_at_all(
    trained: RunDir, bucket: Bucket, model_of: ModelOf, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "train.jsonl", seed=1).read_bytes()
    config = config_of(
        bucket.upload(model_of("llama"), "changed/llama"),
        bucket.put("changed/a.jsonl", rows),
        tmp_path / "home",
    )
    train(config)
    longer = config.model_copy(update={"max_steps": 6})
    train(longer)
    bucket.put("changed/a.jsonl", rows + b'{"question": "1 plus 1?", "answer": "2"}\n')
    with pytest.raises(RunError, match=r"data set `s3://rows/changed/a.jsonl` has changed since this run"):
        train(longer.model_copy(update={"max_steps": 8}))
    bucket.put("changed/a.jsonl", rows)
    weights = (model_of("qwen3") / "model.safetensors").read_bytes()
    bucket.put("changed/llama/model.safetensors", weights)
    with pytest.raises(RunError, match="model `s3://rows/changed/llama` has changed since") as error:
        train(longer.model_copy(update={"max_steps": 8}))
    assert "hub" not in str(error.value.hint)


@pytest.mark.ray
def test_train_fetches_trains_and_goes_on(bucket: Bucket, model_of: ModelOf, tmp_path: Path) -> None:
    rows = bucket.put("whole/train.jsonl", write_rows(tmp_path / "train.jsonl").read_bytes())
    config = config_of(bucket.upload(model_of("llama"), "whole/llama"), rows, tmp_path / "home")
    command = Command(config.model_copy(update={"num_workers": 1}))
    assert command.wait() == 0, command.output()
    assert (command.run.final_path / "adapter_model.safetensors").is_file()
    assert command.output().count("fetching `s3://") == 2
    assert "secret-of-the-tests" not in command.output()

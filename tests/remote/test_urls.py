"""Addresses among the settings: what is taken, what is refused, and that no secret is shown or recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.config import EvaluateConfig, TrainConfig
from tunesmith.config.layers import dump_settings, dump_yaml, load_settings, settings_from_dump
from tunesmith.errors import ConfigError
from tunesmith.runs.identity import default_run_name
from tunesmith.urls import is_url, mask, name_of

SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/folder/train.jsonl", "train.jsonl"),
        ("s3://bucket/folder/", "folder"),
        ("s3://bucket", "bucket"),
        ("s3://bucket/a:b@c.jsonl", "a:b@c.jsonl"),
        ("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/rows/x.csv", "x.csv"),
        ("gs://bucket/x.parquet", "x.parquet"),
        ("hf://datasets/org/name@refs%2Fconvert%2Fparquet/train.parquet", "train.parquet"),
        ("https://host:8443/a%20b.jsonl?download=true&author=me", "a b.jsonl"),
        ("http://localhost:9000/x@y.jsonl", "x@y.jsonl"),
        ("S3://bucket/x.jsonl", "x.jsonl"),
    ],
)
def test_an_address_is_taken_as_it_is(url: str, name: str) -> None:
    config = load_settings(TrainConfig, None, {"dataset_name": url}, {})
    assert config.dataset_name == url
    assert name_of(url) == name
    assert mask(url) == url


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/rows.jsonl",
        f"https://{SECRET}@host/rows.jsonl",
        f"s3://KEY:{SECRET}@bucket/rows.jsonl",
        f"s3://KEY:{SECRET}/with/slash@bucket/rows.jsonl",
        f"hf://user:{SECRET}@datasets/org/name/rows.jsonl",
        f"s3://KEY:{SECRET}/bucket/rows.jsonl",
        f"https://user:{SECRET}%40host/rows.jsonl",
        f"https://host/rows.jsonl?X-Amz-Algorithm=A&X-Amz-Credential={SECRET}",
        f"https://host/rows.jsonl?X-Amz-Signature={SECRET}&versionId=3",
        f"https://host/rows.jsonl?X-Amz-Security-Token={SECRET}",
        f"https://host/rows.jsonl?AWSAccessKeyId={SECRET}",
        f"https://host/rows.jsonl?X-Goog-Signature={SECRET}",
        f"https://host/rows.jsonl?sv=2024&sig={SECRET}",
        f"https://host/rows.jsonl?a=b&token={SECRET}",
        f"https://host/rows.jsonl?access_token={SECRET}",
        f"https://host/rows.jsonl?api-key={SECRET}",
        f"https://host/rows.jsonl#password={SECRET}",
    ],
)
@pytest.mark.parametrize("way", ["flag", "variable", "YAML", "list", "model"])
def test_an_address_that_holds_a_secret_is_refused_and_never_shown(
    url: str, way: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"dataset_name: '{url}'" if way == "YAML" else f"datasets: [dataset_name: '{url}', dataset_name: a]"
    )
    given = {"flag": {"dataset_name": url}, "model": {"model_path": url}}.get(way, {})
    environ = {"TUNESMITH_DATASET_NAME": url} if way == "variable" else {}
    if way == "list":
        file.write_text(f"datasets:\n- dataset_name: '{url}'\n- dataset_name: a\n")
    with pytest.raises(ConfigError) as error:
        load_settings(TrainConfig, file if way in ("YAML", "list") else None, given, environ)
    said = str(error.value)
    assert SECRET not in said
    assert "***" in said and "leave it out" in said


@pytest.mark.parametrize(
    "url",
    [
        f"s3:/KEY:{SECRET}@bucket/x.jsonl",
        f"https://user:{SECRET} with white space@host/x.jsonl",
        f"ftp://user:{SECRET}@host/x.jsonl",
        f"s3://KEY:{SECRET}@bucket/a b.jsonl?sig={SECRET}",
    ],
)
def test_what_is_refused_for_another_reason_shows_no_secret_either(url: str) -> None:
    with pytest.raises(ConfigError, match=r"\*\*\*") as error:
        load_settings(TrainConfig, None, {"dataset_name": url}, {})
    assert SECRET not in str(error.value) and "white space@" not in str(error.value)


def test_what_a_library_says_is_shown_but_for_secrets() -> None:
    said = "can't reach http://127.0.0.1:8000: refused by https://host:1/a?page=2&sig=abc as s3://u:p@b"
    assert (
        mask(said)
        == "can't reach http://127.0.0.1:8000: refused by https://host:1/a?page=2&sig=*** as s3://***@b"
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("abfs://container/x.jsonl", "addresses begin with s3://, gs://, hf://, https://"),
        ("file:///x.jsonl", "all else is a path"),
        ("s3:/bucket/x.jsonl", "write s3://"),
        ("s3:///x.jsonl", "comes the name of a bucket"),
        ("https://host/", "names one file"),
        ("s3://bucket/a b.jsonl", "no white space"),
        ("s3://bucket/..", "names nothing"),
        ("https://host/%2e%2e", "names nothing"),
        ("https://host/a%00.jsonl", "names nothing"),
        ("https://[host/x.jsonl", "IPv6"),
    ],
)
def test_what_cannot_be_an_address_is_refused_with_the_reason(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(TrainConfig, None, {"dataset_name": url}, {})


@pytest.mark.parametrize("name", ["org/name", "rows.jsonl", "./s3/x.jsonl", "C:/rows.jsonl", "/a:b/c", "~/x"])
def test_a_path_or_a_hub_id_is_no_address(name: str) -> None:
    assert not is_url(name)


def test_a_model_at_an_address_keeps_it_whole_and_is_called_by_its_last_part() -> None:
    url = "s3://bucket/models/Tiny-1B/"
    config = load_settings(TrainConfig, None, {"model_path": url}, {})
    assert (config.model.source, config.model.folder, config.model.name) == (url, None, "Tiny-1B")
    dump = dump_settings(config)
    assert dump["model_path"] == url and url in dump_yaml(config)
    assert settings_from_dump(TrainConfig, dump, config.model_fields_set) == config
    assert default_run_name(config).startswith("Tiny-1B-")
    assert EvaluateConfig(model_path=url).model_path == url


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf_model_id", "given as model_path"),
        ("validation_dataset", "leave it out"),
        ("test_dataset", "leave it out"),
        ("home", "on a disk"),
        ("data_dir", "on a disk"),
    ],
)
def test_an_address_in_another_setting_is_refused_and_its_secret_never_shown(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_settings(TrainConfig, None, {name: f"s3://KEY:{SECRET}@bucket/x"}, {})
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("given", ["models/tiny", "/models/tiny", "./tiny", Path("tiny")])
def test_a_model_at_a_path_is_a_path(given: str | Path) -> None:
    assert TrainConfig(model_path=given).model_path == Path(given)
    assert TrainConfig(model_path="none").model_path is None


@pytest.mark.parametrize(
    ("given", "said"),
    [("https://host/model", "can't list"), (Path("s3://b/model"), "as text, not as a Path")],
)
def test_a_model_that_cannot_be_fetched_is_refused(given: str | Path, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(model_path=given)

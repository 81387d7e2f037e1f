"""An export goes to the hub: asked for first, in one commit, and again where it broke off."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from support.exports import load_weights, write_adapter
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from support.upload_hub import Repository, UploadHub, serve_uploads, user
from tunesmith.api import convert
from tunesmith.config import ConvertConfig
from tunesmith.config.layers import load_settings
from tunesmith.errors import ConfigError, ExportError, RunError

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A hub that knows four tokens, of which HF_TOKEN is the first."""
    with serve_uploads(
        good=user("ada", "write", "club"),
        reading=user("ada", "read"),
        fine=user("ada", "fineGrained"),
        bob=user("bob"),
    ) as served:
        # The library reads its environment once.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", "good")
        yield served


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base", build_tokenizer("byte_bpe"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(
        base, tmp_path_factory.mktemp("adapters") / "adapter", target_modules=["q_proj"]
    ).folder


def settings(adapter: Path, output: Path, **changes: Any) -> ConvertConfig:
    given = {"checkpoints_dir": str(adapter), "output_dir": output, "push_to_hub": "tuned", "verify": False}
    return ConvertConfig(**{**given, **changes})


def contents_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_export_lies_on_the_hub_as_it_lies_here(hub: UploadHub, adapter: Path, tmp_path: Path) -> None:
    exported = convert(settings(adapter, tmp_path / "out"))
    repository = hub.repositories["ada/tuned"]
    assert repository.files == contents_of(tmp_path / "out")
    assert repository.private
    assert repository.messages == ["adapter"]
    assert exported.describe().splitlines()[-1] == f"pushed to {hub.address}/ada/tuned"
    card = repository.files["README.md"].decode()
    assert 'from_pretrained("ada/tuned"' in card
    assert "# base, fine-tuned" in card
    assert "base_model:" not in card, "the hub takes none that it doesn't have"


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [("club/x", "good", "club/x"), ("other/x", "fine", "other/x"), ("x", "bob", "bob/x")],
)
def test_a_name_is_the_user_s_own_or_an_organization_s(
    name: str,
    token: str,
    expected: str,
    hub: UploadHub,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    config = settings(adapter, tmp_path / "out", push_to_hub=name, private=False, commit_message="First try")
    convert(config)
    assert list(hub.repositories) == [expected]
    assert not hub.repositories[expected].private
    assert hub.repositories[expected].messages == ["First try"]


def test_an_adapter_by_itself_is_pushed_too(
    hub: UploadHub, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(settings(adapter, tmp_path / "out", no_merge=True))
    assert "names the base model by its path on this machine" in caplog.text
    assert "adapter_model.safetensors" in hub.repositories["ada/tuned"].files


def test_what_an_earlier_export_has_left_is_replaced_and_the_rest_stays(
    hub: UploadHub, adapter: Path, tmp_path: Path
) -> None:
    convert(settings(adapter, tmp_path / "first", max_shard_size="60KB"))
    files = hub.repositories["ada/tuned"].files
    assert "model.safetensors.index.json" in files
    files |= {"figure.png": b"figure", ".gitattributes": b"lfs"}
    convert(settings(adapter, tmp_path / "first", overwrite=True))
    expected = contents_of(tmp_path / "first") | {"figure.png": b"figure", ".gitattributes": b"lfs"}
    assert hub.repositories["ada/tuned"].files == expected


@pytest.mark.parametrize("token", ["wrong", "reading", None])
def test_a_token_that_may_not_write_is_refused_before_anything_is_written(
    token: str | None, hub: UploadHub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match={"wrong": "refuses the token", "reading": "may only read", None: "no token"}[token]) as error:  # fmt: skip
        convert(settings(adapter, tmp_path / "out"))
    assert "HF_TOKEN" in str(error.value.hint)
    assert not (tmp_path / "out").exists()
    assert not hub.repositories


def test_a_repository_that_everybody_sees_is_pushed_to_on_demand_alone(
    hub: UploadHub, adapter: Path, tmp_path: Path
) -> None:
    hub.repositories["ada/tuned"] = Repository(private=False)
    with pytest.raises(ConfigError, match="everybody sees") as error:
        convert(settings(adapter, tmp_path / "out"))
    assert "--private false" in str(error.value.hint)
    assert not (tmp_path / "out").exists()
    convert(settings(adapter, tmp_path / "out", private=False))
    assert "model.safetensors" in hub.repositories["ada/tuned"].files


def test_another_s_namespace_is_refused(hub: UploadHub, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`ada` doesn't belong to `other`") as error:
        convert(settings(adapter, tmp_path / "out", push_to_hub="other/tuned"))
    assert "`ada`, `club`" in str(error.value.hint)


def test_off_the_hub_it_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE keeps this process off the hub") as error:
        convert(settings(adapter, tmp_path / "out"))
    assert "hf upload tuned FOLDER" in str(error.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["whoami", "commit"])
def test_a_dropped_connection_leaves_the_export_and_the_same_command_goes_on(
    place: str, hub: UploadHub, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(adapter, tmp_path / "out")
    hub.drops[place] = 1
    with pytest.raises(ExportError) as error:
        convert(config)
    if place == "whoami":
        assert "can't ask the hub" in error.value.message
        assert not (tmp_path / "out").exists()
        return
    assert (
        f"the export lies in `{tmp_path / 'out'}`, but it couldn't be pushed to `ada/tuned`"
        in error.value.message
    )
    assert "the same command again" in str(error.value.hint)
    assert not hub.repositories["ada/tuned"].files
    before, sent = contents_of(tmp_path / "out"), [it for it in hub.asked if it.startswith("PUT")]
    assert sent
    with caplog.at_level(logging.INFO, "tunesmith"):
        exported = convert(config)
    assert "taking the export that lies in" in caplog.text
    assert hub.repositories["ada/tuned"].files == contents_of(tmp_path / "out") == before
    assert [it for it in hub.asked if it.startswith("PUT")] == sent
    assert exported.num_bytes == (tmp_path / "out/model.safetensors").stat().st_size


def test_a_file_s_transfer_that_breaks_off_once_is_tried_again(
    hub: UploadHub, adapter: Path, tmp_path: Path
) -> None:
    hub.drops["objects/"] = 1
    convert(settings(adapter, tmp_path / "out"))
    assert hub.repositories["ada/tuned"].files == contents_of(tmp_path / "out")


def test_a_finished_export_is_pushed_as_it_is_under_its_new_name(
    hub: UploadHub, adapter: Path, tmp_path: Path
) -> None:
    first = convert(settings(adapter, tmp_path / "out", push_to_hub=None, verify=True))
    weights = (tmp_path / "out/model.safetensors").stat()
    exported = convert(settings(adapter, tmp_path / "out", push_to_hub="club/tuned", verify=True))
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert exported.describe().splitlines()[:2] == first.describe().splitlines()
    card = (tmp_path / "out/README.md").read_text()
    assert 'from_pretrained("club/tuned"' in card
    (tmp_path / "out/README.md").write_text("A person's own card.")
    convert(settings(adapter, tmp_path / "out"))
    assert hub.repositories["ada/tuned"].files["README.md"] == b"A person's own card."


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"max_shard_size": "1MB"}, {"no_merge": True}, {"verify": True}, {"other": True}], ids=str)  # fmt: skip
def test_another_export_isn_t_taken_for_the_one_that_is_asked_for(
    changes: dict[str, Any], hub: UploadHub, adapter: Path, base: Path, tmp_path: Path
) -> None:
    convert(settings(adapter, tmp_path / "out", push_to_hub=None))
    if changes.pop("other", False):
        adapter = write_adapter(base, tmp_path / "other/adapter", seed=1, target_modules=["q_proj"]).folder
    with pytest.raises(RunError, match="exists already"):
        convert(settings(adapter, tmp_path / "out", **changes))
    assert not hub.repositories


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "-x", "x--y", "./out", "x.git", "a b", "x" * 97, "https://hub/a/b", "true"]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    if not name:
        assert load_settings(ConvertConfig, None, {"push_to_hub": name}, {}, None).push_to_hub is None
        return
    with pytest.raises(ConfigError, match="push_to_hub") as error:
        load_settings(ConvertConfig, None, {"push_to_hub": name}, {}, None)
    assert "my-organization/my-model" in str(error.value)


@pytest.mark.parametrize("name", ["private", "commit_message"])
def test_what_is_only_of_a_push_is_refused_without_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is of what is pushed"):
        load_settings(ConvertConfig, None, {name: "false"}, {}, None)


def test_the_record_of_an_export_says_how_it_was_made(adapter: Path, tmp_path: Path) -> None:
    convert(settings(adapter, tmp_path / "out", push_to_hub=None, max_shard_size="60KB", dtype="float32"))
    record = json.loads((tmp_path / "out/tunesmith.json").read_text())["export"]
    assert (record["dtype"], record["max_shard_size"], record["no_merge"]) == ("float32", 60_000, False)
    assert load_weights(tmp_path / "out")

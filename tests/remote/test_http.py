"""Data sets at https:// addresses, from a real server: fetched once, and each thing that can go wrong."""

from __future__ import annotations

import base64
import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tunesmith.config import HFDatasetConfig
from tunesmith.data.sources import describe_source, local_path, read_rows, source_fingerprint
from tunesmith.errors import DataError
from tunesmith.remote.copies import copies_in

ROWS = [{"text": "one"}, {"text": "zwei äöü"}]
BODY = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@dataclass
class Site:
    """A server of one file: what it answers, and what it was asked."""

    address: str = ""
    body: bytes = BODY
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    status: int = 200
    password: str | None = None
    claimed: int = 0
    gets: int = 0

    @property
    def url(self) -> str:
        return f"{self.address}/folder/train.jsonl?download=true"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    site = Site()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = site.status
            expected = f"Basic {base64.b64encode(f'me:{site.password}'.encode()).decode()}"
            if site.password and self.headers["Authorization"] != expected:
                status = 401
            self.send_response(status)
            body = site.body if status == 200 else b""
            for name, value in {"Content-Length": str(len(body) + site.claimed), **site.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                site.gets += 1
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def read(site: Site, home: Path) -> list[dict[str, object]]:
    """Read the rows as a process of its own does."""
    with copies_in(home):
        return [row for _, row in read_rows(HFDatasetConfig(dataset_name=site.url))]


def copies(home: Path) -> list[Path]:
    return sorted((home / "datasets").glob("fetched-*"))


def test_rows_are_fetched_once_and_are_those_of_the_file(site: Site, tmp_path: Path) -> None:
    local = tmp_path / "train.jsonl"
    local.write_bytes(BODY)
    config = HFDatasetConfig(dataset_name=site.url)
    with copies_in(tmp_path / "home"):
        assert [row for _, row in read_rows(config)] == ROWS
        assert describe_source(config) == "`train.jsonl` (train)"
        assert source_fingerprint(config) == source_fingerprint(HFDatasetConfig(dataset_name=str(local)))
    assert read(site, tmp_path / "home") == ROWS
    assert site.gets == 1
    (copy,) = copies(tmp_path / "home")
    assert json.loads((copy / "source.json").read_text())["url"] == site.url


def test_what_has_changed_is_fetched_anew_beside_the_old_copy(site: Site, tmp_path: Path) -> None:
    config = HFDatasetConfig(dataset_name=site.url)
    with copies_in(tmp_path):
        before, old = source_fingerprint(config), local_path(config)
        site.body, site.headers = b'{"text": "new"}\n', {"ETag": '"2"'}
        assert source_fingerprint(config) == before, "within one start it is one content"
    with copies_in(tmp_path):
        assert source_fingerprint(config) != before
    assert read(site, tmp_path) == [{"text": "new"}]
    assert old is not None and old.read_bytes() == BODY
    assert site.gets == 2


def test_without_a_mark_of_the_content_it_is_compared_itself(site: Site, tmp_path: Path) -> None:
    site.headers = {}
    assert read(site, tmp_path) == read(site, tmp_path) == ROWS
    assert len(copies(tmp_path)) == 1
    site.body = b'{"text": "new"}\n'
    assert read(site, tmp_path) == [{"text": "new"}]
    assert len(copies(tmp_path)) == 2


def test_a_password_comes_from_netrc_and_is_recorded_nowhere(site: Site, tmp_path: Path) -> None:
    site.password = "opensesame"
    with pytest.raises(DataError, match="may not be read") as error:
        read(site, tmp_path / "home")
    assert error.value.hint is not None and ".netrc" in error.value.hint
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password opensesame\n")
    assert read(site, tmp_path / "home") == ROWS
    kept = [path.read_text() for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not any("opensesame" in text for text in kept)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "there is nothing at"),
        (410, "can't read .*410"),
        (403, "may not be read"),
        (500, "can't read .*500"),
    ],
)
def test_what_the_server_answers_is_told_with_the_address(
    status: int, said: str, site: Site, tmp_path: Path
) -> None:
    site.status = status
    with pytest.raises(DataError, match=said) as error:
        read(site, tmp_path)
    assert f"`{site.url}`" in error.value.message
    assert copies(tmp_path) == []


def test_a_server_out_of_reach_is_told_apart_from_a_wrong_name(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"can't read `http://127.0.0.1:1/x.jsonl`: ClientConnector"),
        copies_in(tmp_path),
    ):
        local_path(HFDatasetConfig(dataset_name="http://127.0.0.1:1/x.jsonl"))


def test_what_breaks_off_leaves_nothing_and_the_next_start_fetches_it(site: Site, tmp_path: Path) -> None:
    site.claimed = 10
    with pytest.raises(DataError, match="can't read"):
        read(site, tmp_path)
    assert copies(tmp_path) == list((tmp_path / "datasets").glob(".fetching-*")) == []
    site.claimed = 0
    killed = tmp_path / "datasets" / ".fetching-0000"
    killed.mkdir()
    assert read(site, tmp_path) == ROWS


def test_two_that_start_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    done: list[object] = []
    threads = [threading.Thread(target=lambda: done.append(read(site, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [ROWS] * 4
    assert site.gets == 1


def test_a_folder_that_cannot_be_written_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(DataError, match="can't write what is fetched to"):
        read(site, tmp_path / "home")


def test_more_than_the_disk_holds_is_refused_before_it_is_fetched(site: Site, tmp_path: Path) -> None:
    site.claimed = 1 << 60
    with pytest.raises(DataError, match=r"1152921504\.6 GB, and .* are free"):
        read(site, tmp_path)
    assert site.gets == 0


def test_the_hub_offline_says_so(tmp_path: Path) -> None:
    url = "hf://datasets/org/name/train.jsonl"
    with pytest.raises(DataError, match=url) as error, copies_in(tmp_path):
        local_path(HFDatasetConfig(dataset_name=url))
    assert error.value.hint is not None and "HF_HUB_OFFLINE must be unset" in error.value.hint


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_package_is_named_with_its_extra(
    scheme: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=package) as error, copies_in(tmp_path):
        local_path(HFDatasetConfig(dataset_name=f"{scheme}://bucket/x.jsonl"))
    assert error.value.hint is not None and f"pip install 'tunesmith[{extra}]'" in error.value.hint


def test_long_fetching_shows_how_far_it_is(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tunesmith.remote.backend._PROGRESS_S", 0.0)
    site.body = b'{"text": "%s"}\n' % (b"x" * 12_000_000)
    with caplog.at_level(logging.INFO):
        read(site, tmp_path)
    assert "1 file, 12.0 MB" in caplog.text
    assert f"of 12 MB of `{site.url}`" in caplog.text

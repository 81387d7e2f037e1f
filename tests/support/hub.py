"""A hub of one's own: what `hf download` asks a hub for, answered from a folder of models."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


@contextmanager
def serve_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve each folder `{org}/{name}` as a model and as a data set; give the hub's address, and the files it has sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match unquote(urlsplit(self.path).path).strip("/").removeprefix("datasets/").split("/"):
                case ["api", "models" | "datasets", org, name] | [
                    "api",
                    "models" | "datasets",
                    org,
                    name,
                    "revision",
                    _,
                ] if (folder / org / name).is_dir():
                    self._send(json.dumps({"id": f"{org}/{name}", "sha": COMMIT}).encode())
                case ["api", "models" | "datasets", org, name, "tree", _, *parts] if folder.joinpath(
                    org, name, *parts
                ).is_dir():
                    self._send(json.dumps(list_tree(folder / org / name, *parts)).encode())
                case [org, name, "resolve", _, *parts] if (
                    path := folder.joinpath(org, name, *parts)
                ).is_file():
                    self._send(path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT})
                    if self.command == "GET":
                        sent.append("/".join(parts))
                case _:
                    self.send_error(404)

        do_HEAD = do_GET

        def _send(self, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def list_tree(model: Path, *parts: str) -> list[dict[str, object]]:
    files = sorted(path for path in model.joinpath(*parts).rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": str(path.relative_to(model)),
            "size": path.stat().st_size,
            "oid": digest(path),
        }
        for path in files
    ]


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()

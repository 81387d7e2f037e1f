"""A hub of one's own that takes uploads: as much of its API as huggingface_hub asks for, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# Larger files go to the store of large ones, as do weights.
_REGULAR_BYTES = 1 << 20


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class UploadHub:
    """What the hub holds, and what it was asked for. `users`: the answer to whoami by token.

    `drops`: how many requests whose path has this text are to be broken off.
    """

    users: dict[str, dict[str, Any]]
    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    drops: dict[str, int] = field(default_factory=dict)


def user(name: str, role: str = "write", *organizations: str) -> dict[str, Any]:
    """Return what the hub says of a token's owner."""
    token = {"displayName": "laptop", "role": role}
    return {"name": name, "orgs": [{"name": it} for it in organizations], "auth": {"accessToken": token}}


@contextmanager
def serve_uploads(**users: dict[str, Any]) -> Iterator[UploadHub]:
    """Serve a hub without repositories; each keyword is a token, with its `user`."""
    hub = UploadHub(users)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: UploadHub

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(f"{self.command} {path}")
        for text, left in self.hub.drops.items():
            if text in path and left:
                self.hub.drops[text] -= 1
                self.close_connection = True
                self.connection.close()
                return
        if path.startswith("objects/"):  # its address is as good as a token
            self.hub.objects[path.removeprefix("objects/")] = content
            return self._send({})
        owner = self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if owner is None:
            return self._send({"error": "Invalid credentials in Authorization header"}, 401)
        match self.command, path.split("/"):
            case "GET", ["api", "whoami-v2"]:
                self._send(owner)
            case "POST", ["api", "validate-yaml"]:
                self._check_card(json.loads(content)["content"])
            case "POST", ["api", "repos", "create"]:
                self._create(json.loads(content), owner)
            case "POST", [space, name, "info", "lfs", "objects", "batch"]:
                self._offer(json.loads(content))
            case _, ["api", "models", space, name, *rest]:
                self._of_repository(f"{space}/{name}", rest, content)
            case _:
                self._send({"error": "not known here"}, 404)

    def _create(self, asked: dict[str, Any], owner: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or owner['name']}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories.setdefault(name, Repository(private))
        self._send({"url": f"{self.hub.address}/{name}", "id": name})

    def _of_repository(self, name: str, rest: list[str], content: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        match rest:
            case [] | ["revision", _]:
                siblings = [{"rfilename": it} for it in repository.files]
                self._send({"id": name, "private": repository.private, "sha": "1" * 40, "siblings": siblings})
            case ["tree", *_]:
                self._send(
                    [
                        {"type": "file", "path": it, "size": len(c), "oid": "0"}
                        for it, c in repository.files.items()
                    ]
                )
            case ["preupload", _]:
                files = [
                    {"path": it["path"], "uploadMode": _mode_of(it), "shouldIgnore": False, "oid": None}
                    for it in json.loads(content)["files"]
                ]
                self._send({"files": files})
            case ["commit", _]:
                self._commit(repository, [json.loads(line) for line in content.splitlines()], name)
            case _:
                self._send({"error": "not known here"}, 404)

    def _offer(self, asked: dict[str, Any]) -> None:
        """Say of each large file where to put it, unless it is there."""
        objects = []
        for it in asked["objects"]:
            where = {"upload": {"href": f"{self.hub.address}/objects/{it['oid']}"}}
            objects.append({**it, **({} if it["oid"] in self.hub.objects else {"actions": where})})
        self._send({"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, lines: list[dict[str, Any]], name: str) -> None:
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                    assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
                case "deletedFile":
                    del files[value["path"]]
        repository.files = files
        self._send({"commitUrl": f"{self.hub.address}/{name}/commit/{'2' * 40}", "commitOid": "2" * 40})

    def _check_card(self, card: str) -> None:
        """Refuse what the hub refuses: a base model that can't be one of its own."""
        named = [line.partition(": ")[2] for line in card.splitlines() if line.startswith("base_model:")]
        errors = [
            {"message": f'"base_model" with value "{it}" is not valid'} for it in named if "/" not in it
        ]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def _mode_of(file: dict[str, Any]) -> str:
    is_large = file["size"] > _REGULAR_BYTES or file["path"].endswith((".safetensors", ".bin"))
    return "lfs" if is_large else "regular"

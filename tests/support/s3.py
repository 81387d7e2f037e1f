"""A server of S3's protocol over HTTP, and what lies in it. Needs the packages of requirements-remote.txt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIAOFTHETESTS", "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests"}


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server, and a client of Amazon's own, apart from what is tested."""

    address: str
    name: str
    client: Any

    def put(self, key: str, content: bytes, **options: Any) -> str:
        """Store an object; return its address."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content, **options)
        return f"s3://{self.name}/{key}"

    def upload(self, folder: Path, prefix: str) -> str:
        """Store a folder's files; return the address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{self.name}/{prefix}"

    def remove(self, prefix: str) -> None:
        for found in self.client.list_objects_v2(Bucket=self.name, Prefix=prefix)["Contents"]:
            self.client.delete_object(Bucket=self.name, Key=found["Key"])


@contextmanager
def serve_bucket(name: str) -> Iterator[Bucket]:
    """Serve a bucket, and let this process and those it starts find it by the standard variables alone."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for variable in [it for it in os.environ if it.startswith("AWS_")]:
            patch.delenv(variable)
        nowhere = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
        region = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        address = f"http://{host}:{port}"
        for variable, value in {**CREDENTIALS, **nowhere, **region, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(variable, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket=name)
        try:
            yield Bucket(address, name, client)
        finally:
            server.stop()

"""Which model is meant: the only thing that loading one asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelRef:
    """A model on the disk, on the hub or at an address.

    `source` is the `Path` of a local folder, a hub id, or the address of what isn't fetched yet. `revision` is a branch, tag or commit on the hub;
    None: its main branch. `called` is the name to use in place of the source's last part.
    """

    source: Path | str
    revision: str | None = None
    trust_remote_code: bool = False
    called: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder; None for what lies elsewhere."""
        return self.source if isinstance(self.source, Path) else None

    @property
    def name(self) -> str:
        """Last part of the hub id or of the folder's path, unless it is `called` otherwise."""
        if self.called is not None:
            return self.called
        if isinstance(self.source, Path):
            return self.source.resolve().name
        return self.source.rstrip("/").rsplit("/", 1)[-1]

"""Which model is meant: the only thing that loading one asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.paths import expand_user, is_dir


@dataclass(frozen=True)
class ModelRef:
    """A model on the disk, on the hub or at an address.

    `source` is the `Path` of a local folder, a hub id, or the address of what isn't fetched yet. `revision` is a branch, tag or commit on the hub;
    None: its main branch. `called` is the name to use in place of the source's last part. `given_as` is the
    setting that a local folder was given as.
    """

    source: Path | str
    revision: str | None = None
    trust_remote_code: bool = False
    called: str | None = None
    given_as: str = "model_path"

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


def refer_to(
    name: str, revision: str | None = None, trust_remote_code: bool = False, setting: str = "hf_model_id"
) -> ModelRef:
    """Return the model that is meant by what `setting` holds: a hub id, or a local folder, as other tools take both there.

    What can't be a hub id is a folder, whether or not there is one.
    """
    on_hub = ModelRef(name, revision, trust_remote_code)
    folder = expand_user(name)
    if not (is_path(name) or is_dir(folder)):
        return on_hub
    called = on_hub.name if on_hub.name.strip(".~") else None
    return ModelRef(folder.absolute(), None, trust_remote_code, called, setting)


def is_path(name: str) -> bool:
    """Tell whether `name` can't be an id on the hub, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.rstrip("/").count("/") > 1

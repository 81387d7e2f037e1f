"""An export on the hub: asked for before anything is written, and put there in one commit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import ConvertConfig
from tunesmith.errors import ConfigError, ExportError
from tunesmith.runs.folder import ADAPTER_CONFIG
from tunesmith.runs.tuned import TunedModel
from tunesmith.view.units import format_bytes

logger = logging.getLogger(__name__)

# What an earlier export may have left in the repository: read beside the new files, it would be another model.
_STALE = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", "adapter_config.json")


@dataclass(frozen=True)
class Target:
    """A repository of the hub that the token may write, as far as the hub tells. `name` is with its namespace."""

    name: str
    exists: bool
    is_private: bool


def find_target(config: ConvertConfig) -> Target | None:
    """Return the repository that the export is to be pushed to; None without `push_to_hub`.

    Asks the hub, so that a mistake shows before hours of work.

    Raises:
        ConfigError: the hub is switched off, there is no token, or it may not write there; or the repository is public.
        ExportError: the hub can't be reached.
    """
    if config.push_to_hub is None:
        return None
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise ConfigError(
            f"`push_to_hub` is `{config.push_to_hub}`, and HF_HUB_OFFLINE keeps this process off the hub",
            f"unset it; or leave --push_to_hub out, and push later with `hf upload {config.push_to_hub} FOLDER`",
        )
    if get_token() is None:
        raise ConfigError(
            f"`push_to_hub` is `{config.push_to_hub}`, and there is no token for the hub",
            "set HF_TOKEN to a token that may write, or log in with `hf auth login`",
        )
    api = HfApi()
    try:
        user = api.whoami()
    except Exception as error:  # whatever the hub's library raises
        raise _not_asked(error) from error
    name = _name_of(config.push_to_hub, user)
    try:
        is_private = bool(api.model_info(name).private)
    except Exception as error:
        if _status_of(error) == 404:
            return Target(name, False, config.private)
        raise _not_asked(error) from error
    if config.private and not is_private:
        raise ConfigError(
            f"`push_to_hub` is `{name}`, a repository that everybody sees",
            "--private false pushes there; or give the name of a private repository, or of none yet",
        )
    return Target(name, True, is_private)


def push(folder: Path, tuned: TunedModel, target: Target, config: ConvertConfig) -> str:
    """Put what an export's folder holds into the repository, in one commit; return its address.

    Weight files that an earlier export has left there go in the same commit.

    Raises:
        ExportError: it broke off. The folder stays, and so does what the hub has of its files.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    paths = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    if tuned.base is not None and tuned.base.folder is not None and (folder / ADAPTER_CONFIG).is_file():
        logger.warning(
            "%s names the base model by its path on this machine, `%s`: who loads the adapter elsewhere has to put in another",
            ADAPTER_CONFIG,
            tuned.base.folder,
        )
    api = HfApi()
    size = format_bytes(sum(path.stat().st_size for path in paths.values()))
    logger.info("pushing %d files, %s, to `%s`", len(paths), size, target.name)
    try:
        with _bars_on_terminals_alone():
            if not target.exists:
                api.create_repo(target.name, private=target.is_private, exist_ok=True)
            there = api.list_repo_files(target.name) if target.exists else []
            operations: list[Any] = [
                CommitOperationDelete(name) for name in there if name.endswith(_STALE) and name not in paths
            ]
            operations += [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
            api.create_commit(
                target.name, operations, commit_message=config.commit_message or _message(tuned)
            )
    except Exception as error:  # whatever the hub's library raises
        raise ExportError(
            f"the export lies in `{folder}`, but it couldn't be pushed to `{target.name}`: {_reason(error)}",
            "the same command again pushes it without making it anew, and sends no large file twice; or "
            f"`hf upload {target.name} {folder}`",
        ) from error
    return f"{api.endpoint}/{target.name}"


def _name_of(name: str, user: dict[str, Any]) -> str:
    """Return a repository's name with its namespace, the user's own where none is given.

    Raises:
        ConfigError: the token may not write there.
    """
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ConfigError(
            f"`push_to_hub` is `{name}`, and the token `{token.get('displayName', '')}` of `{user['name']}` may only read",
            "make one that may write, and give it in HF_TOKEN or with `hf auth login`",
        )
    if "/" not in name:
        return f"{user['name']}/{name}"
    namespace = name.partition("/")[0]
    known = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    # What a fine-grained token may do isn't told.
    if token.get("role") == "write" and namespace not in known:
        raise ConfigError(
            f"`push_to_hub` is `{name}`, and `{user['name']}` doesn't belong to `{namespace}`",
            f"this token's are {', '.join(f'`{it}`' for it in known)}; give the name alone for your own",
        )
    return name


def _not_asked(error: Exception) -> ConfigError | ExportError:
    if _status_of(error) in (401, 403):
        return ConfigError(
            f"the hub refuses the token: {_reason(error)}",
            "set HF_TOKEN to a token that may write, or log in with `hf auth login`; HF_TOKEN goes before the login",
        )
    return ExportError(
        f"can't ask the hub whether it takes the export: {_reason(error)}",
        "nothing was written; check the network, or leave --push_to_hub out and push later with `hf upload`",
    )


def _status_of(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    """Return what the library says, and what that came of, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) or type(error).__name__
    return (
        f"{said} ({_reason(error.__cause__)})"
        if isinstance(error, RuntimeError) and error.__cause__
        else said
    )


def _message(tuned: TunedModel) -> str:
    step = f", step {tuned.step}" if tuned.step is not None else ""
    return f"{tuned.run.run_name}{step}" if tuned.run else tuned.folder.name


@contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()

"""What a backend's error means for the person who gave the address."""

from __future__ import annotations

from typing import Literal

from tunesmith.errors import DataError, ModelError, TunesmithError
from tunesmith.urls import credentials_of, mask, scheme_of

Kind = Literal["datasets", "models"]

ERRORS: dict[Kind, type[TunesmithError]] = {"datasets": DataError, "models": ModelError}
_PACKAGES = {"s3": "s3fs, which tunesmith[s3] brings", "gs": "gcsfs, which tunesmith[gcs] brings"}


def explain(error: Exception, url: str, kind: Kind) -> TunesmithError:
    """Return the error that says what a backend has raised for an address."""
    make, scheme = ERRORS[kind], scheme_of(url)
    reason = mask((str(error).strip() or type(error).__name__).splitlines()[0])
    credentials = f"credentials come from {credentials_of(url)}"
    if isinstance(error, ImportError):
        package = _PACKAGES.get(scheme, f"a package ({reason})")
        extra = {"s3": "s3", "gs": "gcs"}.get(scheme, "")
        remedy = f"pip install 'tunesmith[{extra}]'" if extra else "install tunesmith again"
        return make(f"`{url}` needs {package}", f"{remedy}; for a cluster it belongs in the image")
    if _is_refused(error) or "Credentials" in type(error).__name__:
        return make(f"`{url}` may not be read: {reason}", credentials)
    if is_absent(error):
        said = "" if reason in url or reason == "Not Found" else f" ({reason.rstrip('.')})"
        return make(f"there is nothing at `{url}`{said}", f"check bucket, names and capitals; {credentials}")
    cause = _cause(error)
    if cause is not error:
        reason = mask(f"{type(cause).__name__}: {cause}".splitlines()[0])
    return make(f"can't read `{url}`: {reason}", f"check the network and the address; {credentials}")


def is_absent(error: Exception) -> bool:
    """Return whether the server has answered that there is nothing."""
    # HTTP's backend calls everything absent, whatever came in the way.
    is_answer = not type(_cause(error)).__module__.startswith("aiohttp")
    return (isinstance(error, FileNotFoundError) and is_answer) or _status(error) == 404


def _is_refused(error: Exception) -> bool:
    return isinstance(error, PermissionError) or _status(error) in (401, 403)


def _status(error: Exception) -> int | None:
    """Return the number that a server has answered with, as aiohttp and httpx have it."""
    cause = _cause(error)
    return getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)


def _cause(error: BaseException) -> BaseException:
    return error.__cause__ or error

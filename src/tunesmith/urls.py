"""Addresses of what lies elsewhere: which words are such, what they may hold, and what of them is shown."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

SCHEMES = ("s3", "gs", "hf", "https", "http")

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine or pod; "
    "AWS_ENDPOINT_URL names a server other than Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the pod's service account",
    "hf": "HF_TOKEN, or `hf auth login`; HF_HUB_OFFLINE must be unset",
    **dict.fromkeys(("https", "http"), "~/.netrc, or the file that NETRC names"),
}
# With one slash where a Path has swallowed the other.
_BEGIN = re.compile(rf"(?i)\s*(?:[a-z][a-z0-9+.-]+://|(?:{'|'.join(SCHEMES)}):/)")
# Names of the parts of a query whose values open something.
_SECRET_NAME = (
    r"[\w.-]*(?:signature|token|secret|passw|pwd|credential|authorization|oauth|jwt)[\w.-]*"
    r"|[\w.-]*(?:key|key[-_]?id|accessid|sig|auth)|code|policy"
)
_SECRET_PART = re.compile(rf"(?i)([?&#;](?:{_SECRET_NAME})=)[^&#;\s`\"']*")
# Who asks, before the host: all up to an @, which may come after a slash where there is a colon that begins no port.
_PORT = r"\d+(?:[/?#\s`\"':,)\]]|$)"
_USER = re.compile(rf"(?i)(:/+)(?:[^/`\"'@]+|(?!arn:|\[)[^/`\"'@:]+:(?!{_PORT})[^`\"'@]+)@")
# Or, where no @ follows, a colon that begins no port.
_PAIR = re.compile(rf"(?i)(:/+)(?!arn:|\[)[^\s/`\"'@:]+:(?!{_PORT})[^\s/`\"'?#]+")


def is_url(text: object) -> bool:
    """Return whether this is text that looks like an address, of whatever scheme."""
    return isinstance(text, str) and _BEGIN.match(text) is not None


def scheme_of(url: str) -> str:
    """Return the address's scheme, in small letters."""
    return url.partition(":")[0].strip().lower()


def credentials_of(url: str) -> str:
    """Return in words where the credentials for this address are looked for."""
    return _CREDENTIALS[scheme_of(url)]


def check_url(url: str) -> str:
    """Return the address, without white space around it, if it can be read from and holds no secret.

    Raises:
        ValueError: it can't, or it does. Shown with `mask`, such an address shows no secret either.
    """
    url, scheme = url.strip(), scheme_of(url)
    if scheme not in SCHEMES:
        raise ValueError(
            f"addresses begin with {', '.join(f'{it}://' for it in SCHEMES[:4])}; all else is a path"
        )
    if not url.startswith("://", len(scheme)):
        raise ValueError(
            f"it is an address with one slash: write {scheme}://… (in Python as text, not as a Path)"
        )
    if re.search(r"[\s\x00-\x1f`]", url):
        raise ValueError("an address has no white space")
    place = re.split(r"[/?#]", url[len(scheme) + 3 :])[0]
    if not place:
        raise ValueError(f"after {scheme}:// comes the name of a {'host' if scheme[0] == 'h' else 'bucket'}")
    if "@" in place or any(pattern.search(url) for pattern in (_USER, _PAIR, _SECRET_PART)):
        raise ValueError(
            "an address with a password, a key or a signature would be recorded with the run; leave it out: "
            f"credentials come from {credentials_of(url)}"
        )
    if scheme in ("http", "https") and not name_of(url):
        raise ValueError(f"{scheme}:// names one file, and this address ends with none")
    if name_of(url) in (".", "..") or re.search(r"[\x00-\x1f]", name_of(url)):
        raise ValueError("its last part names nothing")
    return url


def name_of(url: str) -> str:
    """Return the last part of the address's path: the file's or folder's name; of a bare bucket, the bucket's."""
    if scheme_of(url) in ("http", "https"):
        return unquote(urlsplit(url).path).rpartition("/")[2]
    return url.rstrip("/").rpartition("/")[2]


def mask(text: str) -> str:
    """Return the text with passwords and signatures in addresses blotted out."""
    return _SECRET_PART.sub(r"\1***", _PAIR.sub(r"\1***", _USER.sub(r"\1***@", text)))

"""A page for the browser that needs nothing but itself: its style, its script, and what the browser may do with it."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined


def render_page(package: str, name: str, **values: Any) -> bytes:
    """Return the page that `name`.html, .css and .js of `package` make of the values, as UTF-8.

    Nothing of the values is ever run: everything is escaped, and the page's policy lets the browser run and load
    nothing but the page's own script and style. The style stands on `page.css`, which all pages share.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = _read("tunesmith.view", "page.css") + _read(package, f"{name}.css")
    script = _read(package, f"{name}.js")
    page = environment.from_string(_read(package, f"{name}.html")).render(
        style=style, script=script, policy=_content_policy(style, script), **values
    )
    # A lone surrogate, which no UTF-8 can hold, becomes a question mark.
    return page.encode("utf-8", errors="replace")


def embed_png(picture: bytes) -> str:
    """Return the address of a picture that lies in the page itself."""
    return f"data:image/png;base64,{_base64(picture)}"


def _read(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _content_policy(style: str, script: str) -> str:
    """Return the Content-Security-Policy that lets nothing run or load but these two texts and the picture."""
    hashes = [_base64(hashlib.sha256(text.encode()).digest()) for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")

"""The chat template that a run uses in place of its tokenizer's: a file, a name among the tokenizer's, or the text itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tunesmith.errors import ConfigError
from tunesmith.paths import expand_user, is_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def is_text(given: str) -> bool:
    """Tell whether `given` is a template itself rather than where one is."""
    return "{%" in given or "{{" in given


def read_if_file(given: str) -> str:
    """Return the text of the file that `given` names, so that it means the same on every machine; else `given`.

    Raises:
        ConfigError: the file can't be read.
    """
    path = expand_user(given) if not is_text(given) else None
    if path is None or not is_file(path):
        return given
    try:
        text = path.read_text(encoding="utf-8-sig")
        # Some folders keep it so, as chat_template.json or tokenizer_config.json.
        found = json.loads(text)["chat_template"] if path.suffix == ".json" else text
        if isinstance(found, list):
            found = {it["name"]: it["template"] for it in found}["default"]
        if not isinstance(found, str) or not found.strip():
            raise ValueError("it holds none")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"can't read a chat template from `{path}`: {error}", "give a file that holds a Jinja template"
        ) from error


def use_chat_template(tokenizer: PreTrainedTokenizerFast, given: str) -> None:
    """Make `given` the tokenizer's chat template.

    Raises:
        ConfigError: there is no such file or name, or it is no template.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    tokenizer.chat_template = _find(tokenizer, read_if_file(given))
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"`chat_template` is no Jinja template: line {error.lineno}: {error.message}", "mend the template"
        ) from error
    except (TemplateError, TypeError, ValueError):
        pass  # a template may ask for more than this


def _find(tokenizer: PreTrainedTokenizerFast, given: str) -> str:
    if is_text(given):
        return given
    named = tokenizer.chat_template
    names: Mapping[str, str] = named if isinstance(named, dict) else {}
    if given in names:
        return names[given]
    listed = ", ".join(f"`{name}`" for name in names) or "none"
    raise ConfigError(
        f"there is no chat template `{given}`",
        f"give a file that holds a Jinja template, or the name of one of the tokenizer's ({listed})",
    )

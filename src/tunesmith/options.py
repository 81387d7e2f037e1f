"""Options of a verb that aren't settings, as `--format` or `--release`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """One option: `value` names what it takes, and is empty for a switch; `short` is a spelling such as `-f`."""

    name: str
    help: str
    value: str = ""
    short: str = ""

    def describe(self) -> str:
        """Return its spellings, as help shows them."""
        spellings = f"{self.short}, {self.name}" if self.short else self.name
        return f"{spellings} {self.value}".rstrip()


def take_options(options: Sequence[Option], words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the values given for each option by name, in order (of a switch an empty text), and the other words.

    Raises:
        ConfigError: an option lacks its value, or a switch has one.
    """
    by_spelling = {name: option for option in options for name in (option.name, option.short) if name}
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        spelling, equals, value = word.partition("=")
        option = by_spelling.get(spelling)
        if option is None:
            rest.append(word)
            continue
        if equals and not option.value:
            raise ConfigError(f"`{spelling}` takes no value", f"write `{spelling}` alone")
        if option.value and not equals:
            value = remaining.pop(0) if remaining else ""
        if option.value and not value:
            raise ConfigError(f"`{spelling}` has no value", f"write `{spelling} {option.value}`")
        given.setdefault(option.name, []).append(value)
    return given, rest


def format_options(options: Sequence[Option]) -> str:
    """Return the lines of a verb's help that explain its options."""
    width = max(len(option.describe()) for option in options)
    return "\n".join(f"  {option.describe().ljust(width)}  {option.help}" for option in options)

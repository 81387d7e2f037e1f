"""A verb of the command: its usage, its words, and its options that aren't settings, as `--format` or `--release`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tunesmith.config import Settings
from tunesmith.config.fields import nearest_name
from tunesmith.config.reference import format_help
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


@dataclass(frozen=True)
class Verb:
    """One verb: `run` takes the verb itself and the words after it, and returns the exit code.

    `settings` are those that its words may set. Of a file of the chart's values it reads `values_section` alone.
    """

    usage: str
    summary: str
    run: Callable[[Verb, list[str]], int]
    settings: type[Settings] | None = None
    options: tuple[Option, ...] = ()
    values_section: str | None = None

    @property
    def name(self) -> str:
        return self.usage.partition(" ")[0]

    def describe(self) -> str:
        """Return its help."""
        text = f"usage: tunesmith {self.usage}\n\n{self.summary[0].upper()}{self.summary[1:]}."
        if self.options:
            text = f"{text}\n\n{format_options(self.options)}"
        return f"{text}\n" if self.settings is None else format_help(self.settings, text)

    def take_options(self, words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
        """Return the values of its options by name, and the other words; see `take_options`."""
        return take_options(self.options, words)

    def read_words(self, words: list[str], wanted: list[str]) -> list[str]:
        """Return the words, which are plain ones, as many as are `wanted` (their names).

        Raises:
            ConfigError: there are more or fewer, or an unknown flag among them.
        """
        usage = f"write `tunesmith {self.usage}`"
        for word in words:
            if word.startswith("-"):
                names = [option.name for option in self.options]
                raise ConfigError(f"unknown flag `{word}`", did_you_mean(word, names) or usage)
        if len(words) < len(wanted):
            raise ConfigError(f"`tunesmith {self.name}` needs `{wanted[len(words)]}`", usage)
        if len(words) > len(wanted):
            raise ConfigError(f"`tunesmith {self.name}` doesn't take `{words[len(wanted)]}`", usage)
        return words


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


def split_passed_on(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `--`, and those behind it, which are for another program."""
    own = list(words)
    if "--" not in own:
        return own, []
    end = own.index("--")
    return own[:end], own[end + 1 :]


def format_options(options: Sequence[Option]) -> str:
    """Return the lines of a verb's help that explain its options."""
    width = max(len(option.describe()) for option in options)
    return "\n".join(f"  {option.describe().ljust(width)}  {option.help}" for option in options)


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str | None:
    """Return the question after the name that is most like the word, or None where none is."""
    near = nearest_name(word, names)
    return f"did you mean `{prefix}{near}`?" if near else None

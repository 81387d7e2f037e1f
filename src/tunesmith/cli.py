"""The command `tunesmith`: finds the verb, turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tunesmith import __version__
from tunesmith.errors import TunesmithError
from tunesmith.terminal import print_in_any_encoding, use_utf8

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's by default) and return the exit code.

    0: done. 1: a failure at work. 2: bad input. 130: interrupted. 141: the reader of stdout is gone.
    """
    if argv is None:
        use_utf8()
    print_in_any_encoding()
    try:
        exit_code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except TunesmithError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # A socket's is a failure; only `tunesmith … | head` ends quietly.
        if not _stdout_is_broken():
            raise
        return BROKEN_PIPE
    return exit_code


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"tunesmith {__version__}")
        return 0
    # Settings are imported with the verbs: an installation can tell its version without the packages they need.
    from tunesmith.verbs import VERBS, format_verbs, refuse_verb

    if not words or words[0] in ("--help", "-h", "help"):
        print(format_verbs(), end="")
        return 0
    if words[0] not in VERBS:
        raise refuse_verb(words)
    verb, rest = VERBS[words[0]], words[1:]
    if "--help" in rest or "-h" in rest:
        print(verb.describe(), end="")
        return 0
    return verb.run(verb, rest)


def _print_error(error: TunesmithError) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint is not None:
        print(f"\nhint: {error.hint}", file=sys.stderr)


def _stdout_is_broken() -> bool:
    """Return whether stdout's reader is gone, and if so silence the interpreter's last flush."""
    import select

    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    broken = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return broken

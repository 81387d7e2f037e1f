"""Build questions and answers from the documentation of the running Python's standard library.

Each row is `{"question": …, "answer": …}`: what a module, class, function or method does (its docstring's
first paragraph), or how it is called (its signature). The same Python gives the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

DEFAULT_PATH = Path(__file__).parent / "build" / "python_questions.jsonl"
ANSWER_CHARACTERS = range(20, 401)

# Only modules whose import does nothing but define names: no windows, no tests, no easter eggs.
MODULES = """
abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code codecs
codeop collections collections.abc colorsys compileall concurrent.futures configparser contextlib
contextvars copy copyreg cProfile csv ctypes ctypes.util dataclasses datetime decimal difflib dis
doctest email email.charset email.encoders email.generator email.header email.headerregistry
email.message email.parser email.policy email.utils enum errno faulthandler fcntl filecmp fileinput
fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib grp gzip hashlib heapq hmac
html html.entities html.parser http http.client http.cookiejar http.cookies http.server imaplib
importlib importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util
inspect io ipaddress itertools json json.decoder json.encoder keyword linecache locale logging
logging.config logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder multiprocessing
multiprocessing.connection multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory
netrc numbers operator optparse os os.path pathlib pdb pickle pickletools pkgutil platform plistlib
poplib posixpath pprint profile pstats pwd py_compile pyclbr pydoc queue quopri random re reprlib
resource runpy sched secrets select selectors shelve shlex shutil signal site smtplib socket
socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys syslog
tabnanny tarfile telnetlib tempfile termios textwrap threading time timeit token tokenize tomllib trace
traceback tracemalloc tty types typing unicodedata unittest unittest.mock urllib.error urllib.parse
urllib.request urllib.response urllib.robotparser uuid venv warnings wave weakref webbrowser
wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate xml.dom
xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils
xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""

QUESTIONS = {
    "module": [
        "What is Python's `{name}` module for?",
        "What does the `{name}` module provide?",
        "When would I import `{name}` in Python?",
    ],
    "class": [
        "What is `{name}` in Python?",
        "What is the class `{name}` for?",
        "Explain `{name}` in a sentence or two.",
    ],
    "function": [
        "What does `{name}` do?",
        "In Python, what is `{name}` used for?",
        "Explain what `{name}` does.",
    ],
    "method": [
        "What does the method `{name}` do?",
        "What happens when I call `{name}`?",
        "Explain the method `{name}`.",
    ],
    "signature": [
        "How do I call `{name}`?",
        "What is the signature of `{name}`?",
        "Which arguments does `{name}` take?",
    ],
}


def build_rows() -> list[dict[str, str]]:
    """Return the rows, in the order of `MODULES`; no question and no answer comes twice."""
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for kind, name, thing in _walk_modules():
        answers = {kind: describe(inspect.getdoc(thing) or "")}
        if kind in ("function", "method"):
            answers["signature"] = _signature(name, thing)
        for topic, answer in answers.items():
            question = ask(topic, name)
            if len(answer) in ANSWER_CHARACTERS and not {question, answer} & seen:
                seen |= {question, answer}
                rows.append({"question": question, "answer": answer})
    return rows


def ask(topic: str, name: str) -> str:
    """Return a question about `name`; which of the phrasings follows from the name alone."""
    phrasings = QUESTIONS[topic]
    digest = hashlib.sha256(f"{topic} {name}".encode()).digest()
    return phrasings[digest[0] % len(phrasings)].format(name=name)


def describe(doc: str) -> str:
    """Return the first paragraph of prose in a docstring, in whole sentences; empty if there is none."""
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        text = " ".join(paragraph.split())
        # Not prose: a signature, an example, a table, a heading, a list.
        if re.match(r"[\w.]+\(|>>>|[-=+*|#]|\w+ ?->|:\w+", text) or re.search(r"[=~-]{4}|->", text):
            continue
        text = re.sub(r":[\w:]+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
        sentences = re.findall(r".+?[.!?](?=\s+[A-Z`]|$)|.+$", text)
        kept = ""
        for sentence in map(str.strip, sentences):
            if sentence.endswith(":") or len(kept) + len(sentence) >= ANSWER_CHARACTERS.stop - 1:
                break
            kept = f"{kept} {sentence}".strip()
        return kept if not kept or kept[-1] in ".!?" else f"{kept}."
    return ""


def write_rows(rows: list[dict[str, str]], path: Path) -> bool:
    """Write the rows as JSONL, whole or not at all; return False if the file held just these already."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.is_file() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
    return True


def _walk_modules() -> Iterator[tuple[str, str, Any]]:
    for module_name in MODULES.split():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                module = importlib.import_module(module_name)
        except ImportError:
            continue  # gone from this version, or not built on this platform
        yield "module", module_name, module
        yield from _walk_names(module, module_name)


def _walk_names(module: ModuleType, module_name: str) -> Iterator[tuple[str, str, Any]]:
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name, thing in sorted(vars(module).items()):
        if not _is_public(name, thing, module):
            continue
        if inspect.isclass(thing):
            yield "class", f"{prefix}{name}", thing
            for method_name, method in sorted(vars(thing).items()):
                if not method_name.startswith("_") and inspect.isroutine(method):
                    yield "method", f"{prefix}{name}.{method_name}", getattr(thing, method_name)
        elif inspect.isroutine(thing):
            yield "function", f"{prefix}{name}", thing


def _is_public(name: str, thing: Any, module: ModuleType) -> bool:
    if hasattr(module, "__all__"):
        return name in module.__all__
    # Without a list, what a module imported for its own use isn't its own.
    home = getattr(thing, "__module__", None) or module.__name__
    return (
        not name.startswith("_") and home.lstrip("_").partition(".")[0] == module.__name__.partition(".")[0]
    )


def _signature(name: str, thing: Any) -> str:
    try:
        signature = inspect.signature(thing)
    except (AttributeError, TypeError, ValueError):
        return ""  # some functions written in C tell nothing, and one in Python 3.13 breaks `inspect`
    parameters = [
        parameter for parameter in signature.parameters.values() if parameter.name not in ("self", "cls")
    ]
    text = str(signature.replace(parameters=parameters))
    # Nothing to learn from an empty list; an object's address and a set's order differ from run to run.
    return "" if not parameters or re.search(r"[<{]|/\w", text) else f"`{name}{text}`"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, nargs="?", default=DEFAULT_PATH, help="the JSONL file to write")
    path = parser.parse_args().path
    rows = build_rows()
    state = "written" if write_rows(rows, path) else "up to date"
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"data set: {len(rows):,} questions from Python {version}'s documentation, {os.path.relpath(path)} ({state})"
    )

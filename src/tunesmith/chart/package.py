"""The package as a zip, for pods of a stock Ray image: `python -m tunesmith.chart.package FILE` writes it.

With `--requirements` in place of the file it prints values by which Ray installs what the package needs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import lzma
import re
import tokenize
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import yaml

import tunesmith

_SUFFIXES = (".py", ".html", ".css", ".js")
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # of a zip's dates


def package_zip() -> bytes:
    """Return the zip that PYTHONPATH takes: the sources as xz, and what unpacks them. Same files, same bytes."""
    start = Path(__file__).with_name("packed.py").read_bytes()
    return _zip({"tunesmith/__init__.py": start, "tunesmith/sources.xz": lzma.compress(sources_zip())})


def sources_zip() -> bytes:
    """Return a zip of the sources and what they read, without the chart, uncompressed."""
    root = Path(tunesmith.__file__).parent
    # The chart's folder holds scripts, and is no package.
    folders = [path.parent for path in root.rglob("__init__.py")]
    paths = [path for folder in folders for path in folder.iterdir() if path.suffix in _SUFFIXES]
    return _zip({path.relative_to(root.parent).as_posix(): _code_of(path).encode() for path in sorted(paths)})


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            entry = ZipInfo(name, _EARLIEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def _code_of(path: Path) -> str:
    """Return what runs of a file: of Python without comments and docstrings, every line at its own number.

    Helm keeps the zip twice in a secret of at most 1 MiB.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    lines = text.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token, following in reversed(list(pairwise(tokens))):
        is_docstring = token.type == tokenize.STRING and following.type == tokenize.NEWLINE
        is_docstring = is_docstring and not lines[token.start[0] - 1][: token.start[1]].strip()
        if token.type == tokenize.COMMENT or is_docstring:
            (first, start), (last, end) = token.start, token.end
            kept = '"""' + "\n" * (last - first) + '"""' if is_docstring else ""
            rest = lines[last - 1][end:]
            lines[first - 1 : last] = f"{lines[first - 1][:start]}{kept}{rest}".splitlines(keepends=True)
    return "".join(lines)


def requirements() -> list[str]:
    """Return what the package needs besides Ray, which the image holds, in the versions that are installed here."""
    declared = [text for text in importlib.metadata.requires("tunesmith") or [] if "extra ==" not in text]
    names = [re.split(r"[^-\w.]", text, maxsplit=1)[0] for text in declared]
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in names if name != "ray"}
    return [f"{name}=={version}" for name, version in versions.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tunesmith.chart.package", description=__doc__)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("file", nargs="?", type=Path, help="the chart's files/tunesmith.zip")
    wanted.add_argument("--requirements", action="store_true")
    words = parser.parse_args()
    if words.requirements:
        print(yaml.safe_dump({"ray": {"runtime_env_yaml": {"pip": requirements()}}}), end="")
    else:
        words.file.write_bytes(package_zip())


if __name__ == "__main__":
    main()

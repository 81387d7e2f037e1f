"""Which files of a folder hold the rows of a split, as the `datasets` library chooses them, and which don't."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from tunesmith.data.content import KINDS, explain_name, holds_rows, is_data_name, suffix_of
from tunesmith.data.split_names import split_of_name, splits_of_name, standard_split
from tunesmith.errors import DataError

# Files about a data set, which lie beside its rows.
_NOT_ROWS = {
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "split.json",
}
_MOST_ENTRIES = 100_000
_MOST_SHOWN = 8
# How the hub names a split's files: `data/train_sft-00000-of-00003.parquet`.
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")


@dataclass(frozen=True)
class Listing:
    """The files of a split in the order in which they are read, and the others of rows, each with the reason."""

    read: list[Path]
    unread: list[tuple[Path, str]]


def list_files(path: Path, split: str) -> Listing:
    """Return the files that hold the rows of `split`; a file by itself holds those of any.

    Raises:
        DataError: there are none, or a file's split is in doubt, or the split's files are of two formats.
    """
    if path.is_file():
        if not holds_rows(path):
            what, hint = explain_name(path)
            raise DataError(f"`{path}` is {what}", hint)
        return Listing([path], [])
    everything, linked = _walk(path)
    found = [file for file in everything if not _is_beside_rows(file)]
    files = [file for file in found if holds_rows(path / file)]
    if not files:
        raise DataError(
            f"the folder `{path}` holds no file of rows", _hint_for_none(found or everything, linked)
        )
    chosen = _choose(path, files, split)
    _check_formats(path, chosen, split)
    _check_links(path, chosen)
    read = set(chosen)
    unread = [(file, _reason(file, split)) for file in files if file not in read]
    unread += [(file, explain_name(file)[0]) for file in found if not holds_rows(file)]
    unread += [(folder, "a link to a folder") for folder in linked]
    return Listing([path / file for file in chosen], [(path / file, reason) for file, reason in unread])


def list_files_of_first_version(path: Path, split: str) -> list[Path]:
    """Return the files that a run of rendering 1 has read: all, if no name begins with the split's.

    Such a run goes on with the tokens that it made of them.
    """
    if path.is_file():
        return [path]
    for folder in (path, path / "data"):
        files = sorted(
            file
            for file in folder.glob("*")
            if file.is_file()
            and file.suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
            and not file.name.startswith(".")
            and (file.name not in _NOT_ROWS or file.name == "config.json")
        )
        if files:
            return [file for file in files if file.name.startswith(split)] or files
    return []


def describe_listing(listing: Listing, folder: Path) -> list[str]:
    """Return what is read of a folder, and what isn't and why, a line each."""
    lines = [f"files that are read: {_name_some(file.relative_to(folder) for file in listing.read)}"]
    by_reason = defaultdict(list)
    for file, reason in listing.unread:
        by_reason[reason].append(file.relative_to(folder))
    lines += [f"not read, {reason}: {_name_some(files)}" for reason, files in by_reason.items()]
    return lines


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the data files below `folder`, and the links to folders, which aren't followed.

    Paths are relative to `folder` and in order; hidden ones are left out.
    """

    def fail(error: OSError) -> None:
        raise DataError(
            f"can't read `{error.filename}`: {error.strerror}", "check the folder and its permissions"
        ) from error

    count = 0
    found: list[Path] = []
    linked: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=fail):
        # A mounted disk's own folder, which nobody but root may read.
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and name != "lost+found"]
        count += len(folders) + len(names)
        if count > _MOST_ENTRIES:
            raise DataError(
                f"the folder `{folder}` holds more than {_MOST_ENTRIES:,} files and folders",
                "give the folder that holds the rows alone",
            )
        here = Path(root).relative_to(folder)
        found += [here / name for name in names if is_data_name(Path(name))]
        linked += [here / name for name in folders if (folder / here / name).is_symlink()]
    # A link to nothing counts: reading it fails, rather than leaving its rows out.
    files = [file for file in sorted(found) if (folder / file).is_file() or (folder / file).is_symlink()]
    return files, sorted(linked)


def _is_beside_rows(file: Path) -> bool:
    # Requirements and licences are texts, but nobody's rows; scripts load rows.
    return file.name.startswith(".") or file.name in _NOT_ROWS or suffix_of(file) in (".py", ".yaml", ".yml")


def _choose(path: Path, files: list[Path], split: str) -> list[Path]:
    """Return the files of `split`: by the hub's names, by those of folders, by those of files, in this order.

    A split of the user's own is what files' names begin with. A folder whose names speak of no split is `train`.
    """
    split = split.lower()
    meant = standard_split(split)
    begun = [file for file in files if file.name.lower().startswith(split)]
    shards = {file: name for file in files if (name := _split_of_shard(file)) is not None}
    exact = [file for file, name in shards.items() if name == split]
    if exact:
        return exact
    if meant != split and begun:
        return _check_single(path, begun) if meant else begun
    if meant and shards:
        exact = [file for file, name in shards.items() if name == meant]
    elif meant:
        exact = _check_single(path, [file for file in files if meant in _splits_of_folders(file)])
        exact = exact or _check_single(path, [file for file in files if _own_splits(file) >= {meant}])
    if exact:
        return exact
    if meant and not shards and not any(_splits_of(file) for file in files) and (begun or meant == "train"):
        return begun or files
    listed = [
        f"`{file}` ({shards.get(file) or ' and '.join(sorted(_splits_of(file))) or 'none'})" for file in files
    ]
    raise DataError(
        f"the folder `{path}` has no file of split `{split}`",
        f"name another --split, or give a file by itself; the files and their splits are {_name_some(listed)}",
    )


def _split_of_shard(file: Path) -> str | None:
    match = _SHARD.fullmatch(file.name.lower())
    return match["split"] if match and file.parent == Path("data") else None


def _splits_of_folders(file: Path) -> set[str]:
    # A folder that is named after several splits, as `train_test`, holds them.
    return {split for part in file.parent.parts if (split := split_of_name(part))}


def _own_splits(file: Path) -> set[str]:
    """Return the splits of which the file's own name speaks, if its folders speak of none."""
    return set() if _splits_of_folders(file) else splits_of_name(file.name)


def _splits_of(file: Path) -> set[str]:
    return _splits_of_folders(file) | splits_of_name(file.name)


def _check_single(path: Path, files: list[Path]) -> list[Path]:
    for file in files:
        if len(splits := _splits_of(file)) > 1:
            raise DataError(
                f"`{path / file}` speaks of two splits: {' and '.join(f'`{split}`' for split in sorted(splits))}",
                "rename it or its folder after one of them, or give the file by itself",
            )
    return files


def _check_formats(path: Path, files: list[Path], split: str) -> None:
    """Refuse files that may hold the same rows once more."""
    hint = "keep one of the two; files of different rows can be given as `datasets`, each by itself"
    by_kind = {KINDS[suffix_of(file)]: file for file in reversed(files)}
    if len(by_kind) > 1:
        named = " and ".join(f"`{file}` ({kind})" for kind, file in sorted(by_kind.items()))
        raise DataError(f"split `{split}` of the folder `{path}` is there in two formats: {named}", hint)
    by_stem: dict[PurePath, Path] = {}
    for file in files:
        stem = file.with_name(file.name.lower().rpartition(suffix_of(file))[0])
        other = by_stem.setdefault(stem, file)
        if other != file:
            named = f"`{other}` and `{file}`"
            raise DataError(f"split `{split}` of the folder `{path}` is there in two formats: {named}", hint)


def _check_links(path: Path, files: list[Path]) -> None:
    """Refuse a file that is there once more by another name."""
    by_place: dict[str, Path] = {}
    for file in files:
        other = by_place.setdefault(os.path.realpath(path / file), file)
        if other != file:
            raise DataError(
                f"`{other}` and `{file}` in the folder `{path}` are one file: a link leads to it",
                "remove the link, or give the file by itself",
            )


def _reason(file: Path, split: str) -> str:
    splits = _splits_of(file)
    if not splits or standard_split(split) in splits:
        return "as others are named after the split"
    return f"of split {' and '.join(f'`{name}`' for name in sorted(splits))}"


def _hint_for_none(found: list[Path], linked: list[Path]) -> str:
    if linked:
        return f"`{linked[0]}` is a link to a folder, which isn't followed: give that folder itself"
    if found:
        what, hint = explain_name(found[0])
        return f"`{found[0]}` is {what}: {hint}"
    return f"known suffixes are {', '.join(sorted(KINDS))}"


def _name_some(files: Iterable[object]) -> str:
    names = [str(file) if isinstance(file, str) else f"`{file}`" for file in files]
    shown = ", ".join(names[:_MOST_SHOWN])
    return shown if len(names) <= _MOST_SHOWN else f"{shown} and {len(names) - _MOST_SHOWN:,} more"

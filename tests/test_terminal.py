"""Locales and terminals without UTF-8: nothing fails for a character, and files stay UTF-8."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.cli import main
from tunesmith.terminal import print_in_any_encoding


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal") / "Prüfung 名"
    save_model(folder / "modèle", build_tokenizer("byte_bpe"))
    write_rows(folder / "rows.jsonl")
    return folder


def _words(verb: str, here: Path, home: Path) -> list[str]:
    return {
        "inspect": ["inspect", f"--model_path={here}/modèle", f"--dataset_name={here}/rows.jsonl",
                    "--input_template=→ {question} 名", "--output_template={answer}", f"--home={home}"],
        "plan": ["plan", f"--model_path={here}/modèle", "--max_seq_length=32", "--per_device_train_batch_size=1"],
        "train": ["train", f"--model_path={here}/名", f"--dataset_name={here}/rows.jsonl",
                  "--input_template={question}", "--output_template={answer}", f"--home={home}"],
        "evaluate": ["evaluate", f"{here}/名"],
        "convert": ["convert", f"{here}/名"],
        "watch": ["watch", f"{here}/名"],
        "schema": ["schema", "train", "--format=markdown"],
        "help": ["train", "--help"],
    }[verb]  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "verb", ["inspect", "plan", "train", "evaluate", "convert", "watch", "schema", "help"]
)
def test_a_verb_prints_in_any_encoding(
    verb: str, encoding: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in printed.items():
        monkeypatch.setattr(sys, name, stream)

    code = main(_words(verb, here, tmp_path / "home"))

    monkeypatch.undo()
    for stream in printed.values():
        stream.flush()
    out, err = (stream.buffer.getvalue() for stream in printed.values())
    assert code == (2 if verb in ("train", "evaluate", "convert", "watch") else 0), err
    if verb == "inspect":
        assert rb"-> (" in out and rb"\u540d" in out
        assert (b"[[" in out) and (b"#" in out)
    if verb == "schema":  # another program may read it
        assert "→".encode() in out
    if code:
        assert rb"\u540d" in err


def test_each_character_has_something_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    print_in_any_encoding()
    print("a → b … ⟦é⟧ █▏ ─│┼ × 名 👋 \udce5", end="")
    stream.flush()
    assert stream.buffer.getvalue() == rb"a -> b ... [[\xe9]] ## -|+ x \u540d \U0001f44b \udce5"


def _run(words: list[str], **environ: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a locale without UTF-8."""
    kept = {it: value for it, value in os.environ.items() if not it.startswith(("LC_", "LANG", "PYTHONIO"))}
    return subprocess.run(
        [sys.executable, "-m", "tunesmith", *words],
        env={**kept, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", **environ},
        capture_output=True,
    )


def test_names_and_texts_are_found_and_written_in_utf8_whatever_the_locale(
    here: Path, tmp_path: Path
) -> None:
    """Paths from a YAML file, of which the locale knows no character, and rows with such ones."""
    rows = tmp_path / "Zeilen ü.jsonl"
    texts = ({"text": f"名 → {i}"} for i in range(40))
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts), "utf-8")
    settings = {"model_path": f"{here}/modèle", "dataset_name": str(rows), "home": str(tmp_path / "Läufe 名")}
    (tmp_path / "run.yaml").write_text(json.dumps(settings, ensure_ascii=False), "utf-8")

    done = _run(["inspect", str(tmp_path / "run.yaml")], LC_ALL="C")

    assert done.returncode == 0, done.stderr
    (training,) = (tmp_path / "Läufe 名/datasets").glob("*/training.jsonl")
    assert "名 → " in training.read_text("utf-8")
    assert rb"Zeilen \xfc.jsonl" in done.stdout


def test_an_error_names_what_the_locale_has_no_characters_for(here: Path) -> None:
    done = _run(["watch", f"{here}/名"], LC_ALL="POSIX", PYTHONIOENCODING="ascii")

    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and rb"\u540d" in done.stderr

"""A tokenizer's files stay as they were published, but for what training changed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from support.tiny_models import save_model
from support.tokenizers import TOKENIZER_KINDS, build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.model.files.tokenizer_files import (
    copy_tokenizer,
    pack_tokenizer,
    unpack_tokenizer,
    write_tokenizer,
)
from tunesmith.model.load import load_tokenizer

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
OLD, NEW = "{{ 'old' }}", "{# new #}{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}\n"
KINDS = [kind for kind in TOKENIZER_KINDS if kind != "smollm2"]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("config.json", "generation_config.json", "model.safetensors")
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`published(kind)` is a model's folder, whose tokenizer's files no library of today would write so."""
    folder = tmp_path_factory.mktemp("models")

    def publish(kind: str) -> Path:
        if not (folder / kind).exists():
            save_model(folder / kind, build_tokenizer(kind))
            for name in (CONFIG, "tokenizer.json"):
                content = json.loads((folder / kind / name).read_text())
                (folder / kind / name).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n\n")
            (folder / kind / "tokenizer.model").write_bytes(b"pieces")
            special = f'{{ "eos_token":  "{build_tokenizer(kind).eos_token}" }}'
            (folder / kind / "special_tokens_map.json").write_text(special)
        return folder / kind

    return publish


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_tokenizer_is_the_published_one_byte_for_byte(
    kind: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    ref = ModelRef(published(kind))
    tokenizer = load_tokenizer(ref)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # which it then keeps in itself
    unpack_tokenizer(pack_tokenizer(tokenizer, ref), tmp_path)
    assert contents_of(tmp_path) == contents_of(published(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_has_saved_is_written_as_it_was_published(
    kind: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    """As in the checkpoints of earlier versions."""
    ref = ModelRef(published(kind))
    load_tokenizer(ref).save_pretrained(tmp_path / "saved")
    (tmp_path / "out").mkdir()
    copy_tokenizer(ref, tmp_path / "saved", tmp_path / "out")
    assert contents_of(tmp_path / "out") == contents_of(published(kind))


@pytest.mark.parametrize("places", [[], ["jinja"], ["config"], ["list"], ["jinja", "more"], ["config", "json", "processor"], ["jinja", "config", "json"]], ids="-".join)  # fmt: skip
def test_a_template_that_was_given_stands_wherever_one_stood(
    places: list[str], published: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(published("chatml"), tmp_path / "base")
    (base / TEMPLATE).unlink()
    config = json.loads((base / CONFIG).read_text())
    more = [{"name": "default", "template": OLD}, {"name": "tool_use", "template": OLD}]
    for place in places:
        match place:
            case "jinja":
                (base / TEMPLATE).write_text(OLD)
            case "config" | "list":
                config["chat_template"] = OLD if place == "config" else more
                (base / CONFIG).write_text(json.dumps(config))
            case "json":
                (base / "chat_template.json").write_text(json.dumps({"chat_template": OLD}))
            case "processor":
                (base / "processor_config.json").write_text(json.dumps({"size": 2, "chat_template": OLD}))
            case "more":
                (base / "additional_chat_templates").mkdir()
                (base / "additional_chat_templates/tool_use.jinja").write_text(OLD)
    ref, out = ModelRef(base), tmp_path / "out"
    out.mkdir()
    if "processor" in places:  # copied before the tokenizer
        shutil.copy(base / "processor_config.json", out)
    write_tokenizer(load_tokenizer(ref, chat_template=NEW), ref, out)
    assert OLD not in "".join(path.read_text() for path in out.rglob("*.j*") if path.name != "tokenizer.json")
    assert AutoTokenizer.from_pretrained(out).chat_template == NEW
    assert (out / TEMPLATE).exists() == (not {"config", "list"} & set(places) or "jinja" in places)
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    untouched = {key: value for key, value in config.items() if key != "chat_template"}
    written = json.loads((out / CONFIG).read_text())
    assert {key: value for key, value in written.items() if key != "chat_template"} == untouched
    for name in ("chat_template.json", "processor_config.json"):
        if (base / name).exists():
            assert json.loads((out / name).read_text())["chat_template"] == NEW


def test_a_tokenizer_with_more_tokens_is_written_anew_beside_what_others_read(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    ref = ModelRef(published("chatml"))
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(ref)))
    tokenizer.add_tokens(["<more>"], special_tokens=True)
    write_tokenizer(tokenizer, ref, tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)
    assert (tmp_path / "tokenizer.model").read_bytes() == b"pieces"
    assert not (tmp_path / "special_tokens_map.json").exists(), "it would name the base model's"


def test_an_adapter_s_own_other_tokenizer_is_copied_as_it_is(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer("chatml")))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(adapter)
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text() + "\n\n")
    out.mkdir()
    copy_tokenizer(ModelRef(published("chatml")), adapter, out)
    assert contents_of(out) == {**contents_of(adapter), "tokenizer.model": b"pieces"}


def test_files_that_mean_nothing_without_the_model_s_configuration_are_written_anew(tmp_path: Path) -> None:
    """GPT-2's, of a folder without tokenizer.json: an adapter's folder has no config.json to tell the class."""
    from transformers import GPT2Config, GPT2LMHeadModel

    base, alone = tmp_path / "base", tmp_path / "alone"
    vocab = {**{letter: number for number, letter in enumerate("abcĠ")}, "ab": 4, "<|endoftext|>": 5}
    GPT2LMHeadModel(GPT2Config(vocab_size=6, n_embd=8, n_layer=1, n_head=2)).save_pretrained(base)
    (base / "vocab.json").write_text(json.dumps(vocab))
    (base / "merges.txt").write_text("#version: 0.2\na b\n")
    ref = ModelRef(base)
    tokenizer = load_tokenizer(ref)
    unpack_tokenizer(pack_tokenizer(tokenizer, ref), alone)
    assert load_tokenizer(ref, alone)("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert (alone / "vocab.json").read_bytes() == (base / "vocab.json").read_bytes()

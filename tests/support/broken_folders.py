"""Model folders with one fault each, of the kinds that people have reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 7\n"


class Fault(NamedTuple):
    """What is done to a whole folder, and what an error about it names: file, and field or reason."""

    make: Callable[[Path], object]
    named: tuple[str, ...]


def _edit(file: str, *keys: str, value: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        content = json.loads((folder / file).read_text())
        inside = content
        for key in keys[:-1]:
            inside = inside.setdefault(key, {})
        inside[keys[-1]] = value
        return (folder / file).write_text(json.dumps(content))

    return make


def _write(file: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def _cut(file: str, num_bytes: int) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:num_bytes])


def _recode(file: str, encoding: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text((folder / file).read_text(), encoding=encoding)


def _only_vocabulary(content: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        (folder / "tokenizer.json").unlink()
        return (folder / "tokenizer.model").write_bytes(content)

    return make


def _rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def _torn_index(folder: Path) -> None:
    _rename_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head')


def _old_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"])[:500])
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))


def _torn_pickle(folder: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    _cut("pytorch_model.bin", 2000)(folder)


def _empty_index(folder: Path) -> None:
    _rename_weights(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def _pointer_shard(folder: Path) -> None:
    _rename_weights(folder)
    (folder / "model-00001-of-00001.safetensors").write_text(POINTER)


FAULTS = {
    "tokenizer.json is a pointer": Fault(_write("tokenizer.json", POINTER), ("tokenizer.json", "Git LFS")),
    "tokenizer.json is torn": Fault(_cut("tokenizer.json", 500), ("tokenizer.json", "torn")),
    "tokenizer.json is too new": Fault(
        _edit("tokenizer.json", "model", "type", value="Future"), ("tokenizer.json", "newer version")
    ),
    "tokenizer.model alone": Fault(
        _only_vocabulary(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02"), ("tokenizer.model", "`sentencepiece`")
    ),
    "text in place of a number": Fault(
        _edit("config.json", "rms_norm_eps", value="1e-6"),
        ("config.json", '`rms_norm_eps` is `"1e-6"`', "a number"),
    ),
    "an end token that is text": Fault(
        _edit("generation_config.json", "eos_token_id", value="2"),
        ("generation_config.json", "`eos_token_id`"),
    ),
    "several answers where one is made": Fault(
        _edit("generation_config.json", "num_return_sequences", value=2),
        ("generation_config.json", "`num_return_sequences`"),
    ),
    "weights that are a pointer": Fault(_pointer_shard, ("model-00001-of-00001.safetensors", "Git LFS")),
    "a torn index": Fault(_torn_index, ("model.safetensors.index.json", "torn")),
}
"""Faults that every verb meets."""

MORE_FAULTS = {
    "tokenizer_config.json is torn": Fault(
        _cut("tokenizer_config.json", 30), ("tokenizer_config.json", "torn")
    ),
    "config.json has a byte-order mark": Fault(
        _recode("config.json", "utf-8-sig"), ("config.json", "byte-order mark")
    ),
    "a torn generation config": Fault(_cut("generation_config.json", 20), ("generation_config.json", "torn")),
    "the chat template is a pointer": Fault(
        _write("chat_template.jinja", POINTER), ("chat_template.jinja", "Git LFS")
    ),
    "an empty tokenizer.json": Fault(_write("tokenizer.json", ""), ("tokenizer.json", "torn")),
    "a list as tokenizer_config": Fault(
        _write("tokenizer_config.json", "[]"), ("tokenizer_config.json", "object")
    ),
    "special tokens of a wrong type": Fault(
        _edit("tokenizer_config.json", "eos_token", value=5), ("eos_token",)
    ),
    "a torn list of added tokens": Fault(_write("added_tokens.json", "{"), ("added_tokens.json", "torn")),
    "ranks of tiktoken alone": Fault(
        _only_vocabulary(b"IQ== 0\nIg== 1\n"), ("tokenizer.model", "`tiktoken`")
    ),
    "no tokenizer": Fault(lambda folder: (folder / "tokenizer.json").unlink(), ("holds no tokenizer",)),
    "no width": Fault(
        _edit("config.json", "vocab_size", value=None), ("config.json", "`vocab_size` is `null`")
    ),
    "layers as text": Fault(
        _edit("config.json", "num_hidden_layers", value="2"), ("`num_hidden_layers`", "whole number")
    ),
    "a nested number as text": Fault(
        _edit("config.json", "rope_parameters", value={"rope_type": "linear", "factor": "2"}),
        ("`rope_parameters.factor`",),
    ),
    "text in place of a nested config": Fault(
        _edit("config.json", "rope_parameters", value="x"), ("`rope_parameters`", "an object")
    ),
    "heads that don't divide": Fault(
        _edit("config.json", "num_attention_heads", value=3), ("`num_attention_heads` is `3`",)
    ),
    "no heads": Fault(
        _edit("config.json", "num_attention_heads", value=0), ("`num_attention_heads` is `0`",)
    ),
    "a negative width": Fault(_edit("config.json", "hidden_size", value=-4), ("`hidden_size` is `-4`",)),
    "an unknown activation": Fault(_edit("config.json", "hidden_act", value="nope"), ("`hidden_act`",)),
    "an unknown dtype": Fault(_edit("config.json", "dtype", value="float99"), ("`dtype`",)),
    "a quantization that is text": Fault(
        _edit("config.json", "quantization_config", value="x"), ("`quantization_config`",)
    ),
    "a model of the future": Fault(_edit("config.json", "model_type", value="future"), ("`future`",)),
    "a torn config": Fault(_cut("config.json", 60), ("config.json", "torn")),
    "a list as config": Fault(_write("config.json", "[]"), ("config.json", "JSON object")),
    "bytes as config": Fault(_write("config.json", b"\x80\x02\x00\xff"), ("config.json", "0x80")),
    "a config in UTF-16": Fault(_recode("config.json", "utf-16"), ("config.json", "byte-order mark")),
    "a config that is a pointer": Fault(_write("config.json", POINTER), ("config.json", "Git LFS")),
    "a generation config that is a pointer": Fault(
        _write("generation_config.json", POINTER), ("generation_config.json", "Git LFS")
    ),
    "a list as generation config": Fault(
        _write("generation_config.json", "[]"), ("generation_config.json", "JSON object")
    ),
    "a temperature that is text": Fault(
        _edit("generation_config.json", "temperature", value="hot"), ("`temperature`", "a number")
    ),
    "end tokens of which one is text": Fault(
        _edit("generation_config.json", "eos_token_id", value=[2, "x"]), ("`eos_token_id`",)
    ),
    "an unknown cache": Fault(
        _edit("generation_config.json", "cache_implementation", value="x"), ("`cache_implementation`",)
    ),
    "a torn vocabulary of an older form": Fault(_old_vocabulary, ("vocab.json", "torn")),
    "torn pickled weights": Fault(_torn_pickle, ("pytorch_model.bin", "not a whole file")),
    "an index without a map": Fault(_empty_index, ("index.json", "weight_map")),
}
"""Faults that are told in the same way, wherever a model is looked at."""

"""A conversion's memory: near one file and the adapter, whatever the model's size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from support.exports import load, write_adapter
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.model.files.state import STATE_FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("alone"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's clear_refs"),
]

MIB = 1 << 20
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
SHARD = 50_000_000

# Converts a tiny model first, then prints by how many bytes the large one raises the peak above that.
MEASURE = """
import gc, sys
from pathlib import Path

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024

def measure(work, tiny, large):
    work(*tiny)
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work(*large)
    print(memory("VmHWM") - before)

def ours(kind, base, tuned, output):
    from tunesmith.config import ConvertConfig, ModelRef
    from tunesmith.export.convert import export
    from tunesmith.runs.tuned import TunedModel
    config = ConvertConfig(verify=False, max_shard_size="50MB")
    export(TunedModel(kind, Path(tuned), ModelRef(Path(base))), config, Path(output))

def peft(kind, base, tuned, output):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, tuned).merge_and_unload().save_pretrained(output)

way, kind, *folders = sys.argv[1:]
measure({"ours": ours, "peft": peft}[way], (kind, *folders[:3]), (kind, *folders[3:]))
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A tiny model and one of some 200 MB, both in bfloat16."""
    folder = tmp_path_factory.mktemp("memory")
    for name, shape in (("tiny", {}), ("large", SHAPE)):
        save_model(folder / name, build_tokenizer("byte_bpe"), "llama", torch.bfloat16, **shape)
    yield folder / "tiny", folder / "large"
    shutil.rmtree(folder)


def raised_bytes(way: str, kind: str, tuned: list[Path], bases: tuple[Path, Path], output: Path) -> int:
    """Return by how much converting the large model raises a process's peak memory."""
    folders = [
        path
        for base, folder in zip(bases, tuned, strict=True)
        for path in (base, folder, output / way / base.name)
    ]
    words = [sys.executable, "-c", MEASURE, way, kind, *map(str, folders)]
    # What lives is measured, not what glibc's heap keeps between tensors: 30 MiB more now and then.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    shutil.rmtree(output / way)
    return int(done.stdout.split()[-1])


def test_a_merge_stays_near_one_file_in_memory(bases: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = [
        write_adapter(base, tmp_path / f"adapter_{base.name}", target_modules="all-linear").folder
        for base in bases
    ]
    copy = sum(path.stat().st_size for path in bases[1].glob("*.safetensors"))
    ours = raised_bytes("ours", "adapter", tuned, bases, tmp_path)
    theirs = raised_bytes("peft", "adapter", tuned, bases, tmp_path)
    print(f"model of {copy / MIB:.0f} MiB: ours {ours / MIB:.0f} MiB, PEFT's {theirs / MIB:.0f} MiB")
    adapter = (tuned[1] / "adapter_model.safetensors").stat().st_size
    assert ours < 1.5 * SHARD + adapter
    assert ours < theirs / 2


def test_a_full_checkpoint_stays_near_one_file_in_memory(bases: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = []
    for base in bases:
        weights = {f"model.{name}": parameter.data for name, parameter in load(base).named_parameters()}
        dcp.save(weights, checkpoint_id=tmp_path / base.name / STATE_FOLDER)
        tuned.append(tmp_path / base.name)
    raised = raised_bytes("ours", "state", tuned, bases, tmp_path)
    print(f"full checkpoint: {raised / MIB:.0f} MiB")
    assert raised < 1.5 * SHARD

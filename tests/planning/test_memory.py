"""Host memory: near one copy of the model on a machine, however many workers load it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from support.runs import small_config
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from support.workers import WorkerGroup
from tunesmith.parallel.mesh import build_mesh
from tunesmith.train.build import build_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup"),
]

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
KINDS = ("Pss", "Pss_Anon")
MIB = 1 << 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A tiny model and one of some 400 MB, both in bfloat16."""
    folder = tmp_path_factory.mktemp("memory")
    tokenizer = build_tokenizer("byte_bpe")
    for name, shape in (("tiny", {}), ("large", SHAPE)):
        save_model(folder / name, tokenizer, "llama", torch.bfloat16, **shape)
    yield folder / "tiny", folder / "large"
    shutil.rmtree(folder)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_hold_one_copy_of_the_model_among_them(world_size: int, folders: tuple[Path, Path]) -> None:
    tiny, large = folders
    copy = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    group = WorkerGroup(world_size)
    try:
        pids = group.run(process_id)
        group.run(build, tiny)
        fixed = read_memory(pids)
        with watch_memory(pids) as peak:
            group.run(build, large)
        built = read_memory(pids)
    finally:
        group.close()
    copies = {
        when: {kind: (memory[kind] - fixed[kind]) / copy for kind in KINDS}
        for when, memory in (("peak", peak), ("built", built))
    }
    print(
        f"{world_size} workers: {fixed['Pss'] / MIB:.0f} MiB fixed, model of {copy / MIB:.0f} MiB, {copies}"
    )
    # Private memory is one copy at any time. While loading, the pages of the file are mapped besides; the
    # system takes them back when it needs them, and workers share them (a little more is seen when a worker
    # maps them between two readings).
    assert 0.9 < copies["built"]["Pss"] < 1.3
    assert 0.9 < copies["peak"]["Pss_Anon"] < 1.3
    assert copies["peak"]["Pss"] < 2.6


def read_memory(pids: list[int]) -> dict[str, int]:
    """Return the bytes that the processes hold together; a page that several map counts once."""
    total = dict.fromkeys(KINDS, 0)
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            kind, _, rest = line.partition(":")
            if kind in total:
                total[kind] += int(rest.split()[0]) * 1024
    return total


@contextmanager
def watch_memory(pids: list[int]) -> Iterator[dict[str, int]]:
    """Yield the highest memory seen, read many times a second; whole when the block ends."""
    peak, done = read_memory(pids), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            now = read_memory(pids)
            for kind in KINDS:
                peak[kind] = max(peak[kind], now[kind])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


_built: list[nn.Module] = []
"""In a worker: the model it has built."""


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def build(rank: int, world_size: int, folder: Path) -> None:
    config = small_config(folder, folder, folder, dtype="bfloat16", fsdp="full_shard")
    _built[:] = [build_model(config, torch.device("cpu"), build_mesh(rank, world_size))]

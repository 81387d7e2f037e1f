"""A worker's GPU: what of its memory there is to plan with, and how it is handed out. torch's CUDA is stood in for."""

from __future__ import annotations

import pytest
import torch

from tunesmith.planning.layout import _room_on_gpu
from tunesmith.planning.memory import PROCESS_BYTES
from tunesmith.train.set_up import prepare_process

CUDA = torch.device("cuda", 0)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "reserved", "room"),
    [
        (78 * GIB, 0, 78 * GIB + PROCESS_BYTES["cuda"]),
        (60 * GIB, 18 * GIB, 78 * GIB + PROCESS_BYTES["cuda"]),  # of an earlier model of this process
        (30 * GIB, 0, 30 * GIB + PROCESS_BYTES["cuda"]),  # another process has the rest
        (79 * GIB, 0, 80 * GIB),
    ],
)
def test_memory_that_another_process_holds_is_no_room(
    free: int, reserved: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    assert _room_on_gpu(CUDA) == room


@pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="torch 2.11 doesn't tell its settings"
)
@pytest.mark.parametrize("variable", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_grow_unless_the_user_has_set_the_allocator(
    variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:512")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    try:
        prepare_process(None, CUDA)
        found = torch._C._accelerator_getAllocatorSettings()
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    assert ("expandable_segments:True" in found) == (variable is None)

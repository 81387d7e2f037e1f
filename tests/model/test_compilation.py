"""Compiled blocks train as plain ones, are compiled once, and are refused where nothing can compile them."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from support.gradients import assert_close, gradient_of_step, open_sequences
from support.runs import last_event, small_config, start, train_here
from support.tiny_models import build_config, save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.errors import ResourceError
from tunesmith.model import compilation
from tunesmith.model.compilation import check_compiler, compile_blocks
from tunesmith.model.kernels import attention
from tunesmith.model.kernels.attention import VARLEN, _attend_on_gpu
from tunesmith.model.kernels.install import GPU, install_kernels
from tunesmith.model.kernels.loss import sum_cross_entropy
from tunesmith.parallel.activation_checkpointing import recompute_all
from tunesmith.planning.dry_run import attend_with, make_batch
from tunesmith.planning.live_bytes import AnswersNo
from tunesmith.planning.memory import build_planned_model

CPU = torch.device("cpu")
NUM_BLOCKS = 12

pytestmark = pytest.mark.usefixtures("alone")


def find_missing_compiler() -> str | None:
    try:
        check_compiler(CPU)
    except ResourceError as error:
        return error.message
    return None


needs_compiler = pytest.mark.skipif(find_missing_compiler() is not None, reason=str(find_missing_compiler()))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would write down every graph for pytest's handlers.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", build_tokenizer("byte_bpe"), num_hidden_layers=NUM_BLOCKS)


def trace_alone(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let blocks be traced, and with `aot_eager` differentiated, as for a compiler, but run operation by operation."""
    monkeypatch.setattr(compilation, "BACKEND", backend)


def check_compiled_gradient(config: TrainConfig) -> None:
    sequences = open_sequences(config, packing=True)
    microbatches = [np.array([0, 1]), np.array([2])]
    plain = gradient_of_step(config, sequences, microbatches)
    compiled = config.model_copy(update={"torch_compile": True})
    # Compiled code adds up in another order.
    assert_close(plain, gradient_of_step(compiled, sequences, microbatches), tolerance=1e-4)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_train_as_plain_ones(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    check_compiled_gradient(small_config(model_of("llama"), rows, tmp_path, lora_dropout=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "sdpa", "lora_target_modules": ["q_proj"]},
        pytest.param({"fsdp": "full_shard", "gradient_checkpointing": True}, marks=pytest.mark.long),
        pytest.param({"full_ft": True}, marks=pytest.mark.long),
    ],
)
def test_traced_blocks_train_as_plain_ones(
    changes: dict[str, Any],
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace_alone(monkeypatch, "aot_eager")
    check_compiled_gradient(small_config(model_of("llama"), rows, tmp_path, lora_dropout=0, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, pytest.param({"fsdp": "full_shard"}, marks=pytest.mark.long)])
def test_blocks_share_what_is_compiled_whatever_the_length(
    changes: dict[str, Any], deep: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_alone(monkeypatch, "eager")
    config = small_config(deep, rows, tmp_path, torch_compile=True, **changes)
    sequences = open_sequences(config, packing=False)
    microbatches = [np.array([i]) for i in range(12)]
    assert len({sequences.count(examples).tokens for examples in microbatches}) > 3
    num_graphs = []
    for some in (microbatches[:1], microbatches):
        torch._dynamo.reset()
        counters.clear()
        gradient_of_step(config, sequences, some)
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] == num_graphs[1] < NUM_BLOCKS


@pytest.mark.slow
@needs_compiler
def test_a_run_compiles_when_asked_to_and_keeps_what_it_compiled(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_alone(monkeypatch, "eager")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    run = train_here(start(small_config(model_of("llama"), rows, tmp_path, torch_compile=True, max_steps=1)))
    assert "blocks compiled" in last_event(run, "start")["message"]
    assert counters["stats"]["unique_graphs"] > 0
    assert cache_dir() == str(run.home / "compiled")


def test_a_folder_for_compiled_code_that_the_environment_names_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    compilation.keep_compiled(tmp_path / "theirs")
    assert cache_dir() == str(tmp_path / "mine")


@pytest.mark.slow
@pytest.mark.parametrize("fails_from", [1, 2])
def test_blocks_that_cant_be_compiled_run_plainly_with_one_warning(
    fails_from: int,
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    graphs = []

    def compile_some(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        if len(graphs) >= fails_from:
            raise RuntimeError("no memory to compile in")
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", compile_some)
    config = small_config(model_of("llama"), rows, tmp_path, gradient_checkpointing=True)
    sequences = open_sequences(config, packing=True)
    microbatches = [np.array([0, 1]), np.array([2])]
    plain = gradient_of_step(config, sequences, microbatches)
    compiled = config.model_copy(update={"torch_compile": True})
    assert_close(plain, gradient_of_step(compiled, sequences, microbatches), tolerance=1e-4)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [("can't compile" in text, "no memory to compile in" in text) for text in warnings] == [
        (True, True)
    ]
    assert len(graphs) == fails_from


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
def test_blocks_on_gpus_are_traced_whole_whatever_the_length(
    recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors without data take the GPU's ways; nothing is computed.
    trace_alone(monkeypatch, "eager")
    monkeypatch.setattr(attention, "_attend_on_cpu", attention._attend_on_gpu)
    config = TrainConfig(model_path="model", dataset_name="rows.jsonl", lora_dropout=0.1)
    model: Any = build_planned_model(config, build_config("llama", 64), torch.bfloat16).model
    install_kernels(model, GPU)
    attend_with(model, VARLEN)
    if recomputes:
        recompute_all(model)
    model.enable_input_require_grads()
    compile_blocks(model)
    num_graphs = []
    for num_examples, example_tokens in ((2, 16), (3, 24), (1, 40), (4, 8), (5, 56)):
        batch = make_batch(num_examples * example_tokens, example_tokens, is_flat=True)
        with AnswersNoToCompiled():
            sum_cross_entropy(model, batch, fused=True).backward()
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert 1 <= num_graphs[1] == num_graphs[-1] <= 2


class AnswersNoToCompiled(AnswersNo):
    """Lets what runs inside be compiled all the same."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


@pytest.mark.parametrize("window", [None, 7])
def test_attention_on_gpus_stays_in_the_graph(window: int | None) -> None:
    # Its kernels run nowhere else; tensors without data show what is traced.
    attend = torch.compile(_attend_on_gpu, backend="eager", fullgraph=True, dynamic=True)
    for longest, num_starts in ((9, 4), (10, 5), (12, 6), (13, 5)):
        states = [torch.empty(1, num_heads, 64, 16, device="meta") for num_heads in (4, 2, 2)]
        starts = torch.empty(num_starts, dtype=torch.int32, device="meta")
        assert attend(*states, 0.25, starts, longest, window).shape == (1, 64, 4, 16)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    ("device", "variable", "compiler"),
    [("cpu", "CXX", "g++"), ("cuda", "CC", "gcc"), ("cuda", "CC", "clang")],
)
def test_a_missing_compiler_is_told_before_anything_is_loaded(
    device: str, variable: str, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ResourceError, match=re.escape(f"`{compiler}`")) as caught:
        check_compiler(torch.device(device))
    assert "torch_compile" in str(caught.value.hint)
    program = tmp_path / compiler
    program.touch(mode=0o755)
    message = None
    try:
        check_compiler(torch.device(device))
    except ResourceError as error:
        message = error.message
    # What else is missing on this machine is told then.
    assert message is None or compiler not in message


def test_a_run_without_a_compiler_ends_before_its_model_is_loaded(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start(small_config(model_of("llama"), rows, tmp_path, torch_compile=True))
    shutil.rmtree(job.prepared_path)
    monkeypatch.setenv("CXX", "absent-compiler")
    with pytest.raises(ResourceError, match="absent-compiler"):
        train_here(job)

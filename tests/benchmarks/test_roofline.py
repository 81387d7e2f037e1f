"""What a step costs a GPU is counted from the operations that run: a change switched off shows in the count."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.paths import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))

import page
import roofline
from counted_step import Step, count_step
from fusion import counting_backend
from work import H100, H100_FLASH_3, Work, WorkCounter, total

from tunesmith.model.kernels.install import GPU
from tunesmith.model.kernels.loss import LogitsAtATime

STEP = Step("llama-3.1-8b", rows=2, max_length=4096)
SMALL = Step("llama-3.2-1b", rows=2, max_length=128)

# What a token of the 8B step moves, in MB, and the longest that the step may take, in ms: lower them with the count.
MOST_MB, MOST_MS = 103.8, 703
MOST_COMPILED_MB, MOST_COMPILED_MS = 66.1, 542

ROWS, COLUMNS = 64, 32
SIZE = 4 * ROWS * COLUMNS


def count_calls(function: Any, *inputs: Tensor) -> dict[str, Work]:
    with WorkCounter(H100) as counter:
        function(*inputs)
    return counter.works


def count_compiled(function: Any, *inputs: Tensor) -> dict[str, Work]:
    torch._dynamo.reset()
    counter = WorkCounter(H100)
    compiled = torch.compile(function, backend=counting_backend(counter), dynamic=False)
    with counter:
        compiled(*inputs)
    return counter.works


def make(*shape: int, **options: Any) -> Tensor:
    return torch.empty(shape, device="meta", **options)


def test_the_bytes_of_a_token_stay_below_what_they_were() -> None:
    work = total(count_step(STEP))
    assert work.num_bytes / STEP.num_tokens <= MOST_MB * 1e6
    assert 1e3 * work.seconds <= MOST_MS


@pytest.mark.slow
def test_the_bytes_of_a_token_in_compiled_blocks_stay_below_what_they_were() -> None:
    work = total(count_step(replace(STEP, is_compiled=True, rates=H100_FLASH_3)))
    assert work.num_bytes / STEP.num_tokens <= MOST_COMPILED_MB * 1e6
    assert 1e3 * work.seconds <= MOST_COMPILED_MS


def test_a_change_switched_off_raises_the_count() -> None:
    as_it_is = total(count_step(SMALL)).num_bytes
    off: list[dict[str, Any]] = [
        {"torch_norms": False},
        {"groups_adapters": False},
        {"adapters_first": False},
        {"fuses_adapters": False},
        {"fuses_elementwise": False},
        {"logits": LogitsAtATime(1 << 20, 1 << 20)},
    ]
    for changes in off:
        assert total(count_step(replace(SMALL, kernels=replace(GPU, **changes)))).num_bytes > as_it_is, (
            changes
        )


def test_products_take_their_flop_and_thin_ones_their_bytes() -> None:
    square, thin = make(4096, 4096, dtype=torch.bfloat16), make(4096, 4, dtype=torch.bfloat16)
    (work,) = count_calls(torch.mm, square, square).values()
    assert work == Work(2 * 4096**3 / H100.products, 2 * 4096**3, 3 * 2 * 4096**2)
    (work,) = count_calls(torch.mm, square, thin).values()
    assert work.seconds == work.num_bytes / H100.memory == 2 * 4096 * (4096 + 2 * 4) / H100.memory


def test_an_operation_in_place_reads_and_writes_and_views_are_free() -> None:
    values, others = make(ROWS, COLUMNS), make(ROWS, COLUMNS)
    for function, passes in (
        (lambda: values.T.reshape(1, COLUMNS, ROWS)[0], 0),
        (lambda: values.copy_(others), 2),
        (lambda: values.mul_(others), 3),
        (lambda: torch.mul(values, others, out=torch.empty_like(values)), 3),
        (lambda: values.zero_(), 1),
        (lambda: values * others[:1], 2 + 1 / ROWS),
    ):
        assert total(count_calls(function)).num_bytes == passes * SIZE


def test_a_norm_is_one_kernel_between_its_products() -> None:
    def run(hidden: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        inner = F.rms_norm(hidden @ first, (COLUMNS,), weight, 1e-5) * 2
        return inner @ second + 1

    square = make(COLUMNS, COLUMNS)
    works = count_compiled(run, make(ROWS, COLUMNS), make(COLUMNS), square, square)
    assert set(works) == {"mm", "fused"}
    # The norm reads and writes, as does the sum after the last product.
    assert works["fused"].num_bytes == 4 * SIZE + 4 * COLUMNS


def test_what_a_product_lies_between_is_not_fused() -> None:
    def run(values: Tensor, square: Tensor) -> Tensor:
        doubled = values * 2
        return doubled @ square + doubled

    works = count_compiled(run, make(ROWS, COLUMNS), make(COLUMNS, COLUMNS))
    # Doubling reads and writes; the sum reads two and writes.
    assert works["fused"].num_bytes == 5 * SIZE


def test_results_of_one_size_that_read_the_same_are_made_at_once() -> None:
    works = count_compiled(lambda values: (values + 1, values.exp()), make(ROWS, COLUMNS))
    assert works["fused"].num_bytes == 3 * SIZE


def test_a_sum_over_rows_is_a_kernel_of_its_own() -> None:
    works = count_compiled(lambda values: values.exp().sum(0), make(ROWS, COLUMNS))
    assert works["fused"].num_bytes == 2 * SIZE
    assert works["sum"].num_bytes == SIZE + 4 * COLUMNS


def test_the_last_line_tells_tokens_per_second() -> None:
    assert roofline.last_line(STEP, 0.512) == "8B LoRA 2x4096 bf16: 512 ms, 16,000 tokens/s"


def test_every_switch_of_the_kernels_is_a_lever() -> None:
    levers = dict(roofline.list_levers(SMALL))
    assert {"`torch_norms=False`", "`fuses_adapters=False`", "FlashAttention 3"} < set(levers)
    assert all(levers[name] != SMALL for name in levers if name != roofline.AS_IT_IS)


def test_the_table_says_what_each_change_gives() -> None:
    levers = [
        {"name": name, "plain": {"ms": plain, "bytes": 1.0}, "compiled": {"ms": compiled, "bytes": 1.0}}
        for name, plain, compiled in ((roofline.AS_IT_IS, 700.0, 600.0), ("a lever", 800.0, 590.0))
    ]
    table = page.tabulate_roofline({"last_line": "512 ms", "rates": "fast", "levers": levers})
    assert "| a lever | 800 (+100) | 590 (−10) |" in table
    assert table.startswith("512 ms. Rates: fast.")

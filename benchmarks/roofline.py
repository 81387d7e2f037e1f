"""Counts what a step of LoRA training takes of an H100 at best, and what each lever gives: no GPU, no weights, no data.

    PYTHONPATH=src python benchmarks/roofline.py [--shape llama-3.1-8b] [--rows 2] [--max_length 4096]

Operations follow one another at the stated rates; what isn't counted, such as launches, comes on top. The last line
is that of compiled blocks and FlashAttention 3; what a run does that sets neither is the table's first figure.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from counted_step import Step, count_step
from gpu_parts.shapes import SHAPES
from work import H100, H100_FLASH_3, Works, total

from tunesmith.atomic_files import write_json
from tunesmith.model.kernels.install import GPU
from tunesmith.model.kernels.loss import CPU_LOGITS

_FOLDER = Path(__file__).parent
AS_IT_IS = "as it is"


def main() -> None:
    words = _parse()
    # Of adapters on a model that has no files.
    warnings.filterwarnings("ignore", "The PEFT config", UserWarning)
    step = Step(words.shape, words.rows, words.max_length)
    rows = []
    for name, changed in list_levers(step):
        plain, compiled = (count_step(each) for each in (changed, replace(changed, is_compiled=True)))
        rows.append({"name": name, "plain": _sum_up(plain), "compiled": _sum_up(compiled)})
        print(
            f"{name}: {rows[-1]['plain']['ms']:.0f} ms, compiled {rows[-1]['compiled']['ms']:.0f} ms",
            flush=True,
        )
    best = count_step(replace(step, is_compiled=True, rates=H100_FLASH_3))
    print(f"\n{describe_rates()}\n\n{_list_operations(best)}\n")
    line = last_line(step, total(best).seconds)
    write_json(words.results, {"rates": describe_rates(), "levers": rows, "last_line": line})
    print(line)


def list_levers(step: Step) -> Iterator[tuple[str, Step]]:
    """Yield the step as it is, and with each of what can be changed about it alone, by name."""
    yield AS_IT_IS, step
    for field in fields(GPU):
        value = getattr(GPU, field.name)
        if isinstance(value, bool) and field.name != "packs_masks":  # a step keeps no masks
            changed: dict[str, Any] = {field.name: not value}
            yield f"`{field.name}={not value}`", replace(step, kernels=replace(GPU, **changed))
    yield "as few logits at a time as on a CPU", replace(step, kernels=replace(GPU, logits=CPU_LOGITS))
    yield "dropout of masks that are kept", replace(step, drops_by_token=False)
    yield "without dropout", replace(step, dropout=0.0)
    yield "FlashAttention 3", replace(step, rates=H100_FLASH_3)


def describe_rates() -> str:
    two, three = H100, H100_FLASH_3
    return (
        f"products {two.products / 1e12:.0f} TFLOP/s, memory {two.memory / 1e12:.1f} TB/s, FlashAttention 2 "
        f"{two.attention / 1e12:.0f} TFLOP/s forward and {two.attention_backward / 1e12:.0f} backward, "
        f"3 {three.attention / 1e12:.0f} and {three.attention_backward / 1e12:.0f}, "
        f"{two.draws / 1e9:.0f}·10⁹ random numbers/s, {two.integers / 1e12:.0f}·10¹² 64-bit integer operations/s"
    )


def last_line(step: Step, seconds: float) -> str:
    size = step.shape.rsplit("-", 1)[-1].upper()
    speed = step.num_tokens / seconds
    return f"{size} LoRA {step.rows}x{step.max_length} bf16: {1e3 * seconds:.0f} ms, {speed:,.0f} tokens/s"


def _sum_up(works: Works) -> dict[str, float]:
    work = total(works)
    return {"ms": 1e3 * work.seconds, "flops": work.flops, "bytes": work.num_bytes}


def _list_operations(works: Works) -> str:
    longest = sorted(works.items(), key=lambda item: -item[1].seconds)
    return "\n".join(
        f"{name:24} {1e3 * work.seconds:8.2f} ms {work.flops / 1e12:8.1f} TFLOP {work.num_bytes / 1e9:8.2f} GB"
        for name, work in longest
        if work.seconds > 1e-5
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of each row")
    parser.add_argument("--rows", type=int, default=2, help="rows of a microbatch")
    parser.add_argument("--results", type=Path, default=_FOLDER / "results" / "roofline.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Tokens per second of an evaluation's vLLM engine beside a bare vllm.LLM.generate over the same prompts.

    .venv/bin/python benchmarks/generation.py [--model FOLDER] [--samples 64] [--rounds 3]

Both run on the one model that the engine has loaded, in turns, greedily and without a stop token: each answer
has all its tokens. The bare one returns when the last answer is finished; the engine yields each as it is. The
first round, which warms up, isn't counted.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from tunesmith.config import ModelRef
from tunesmith.evaluate.engines.base import EngineSpec, Request
from tunesmith.evaluate.engines.vllm import VLLMEngine

_MODEL = Path(__file__).parents[1] / "examples/quickstart/build/SmolLM2-135M-Instruct"
_PROMPT_TOKENS = (20, 120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=_MODEL, help="model folder")
    parser.add_argument("--samples", type=int, default=64, help="prompts a round")
    parser.add_argument("--max_tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--batch_size", type=int, default=16, help="answers generated at once")
    parser.add_argument("--num_threads", type=int, help="CPU threads; unset: torch's choice")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way runs")
    words = parser.parse_args()
    spec = _make_spec(words)
    requests = _make_requests(words.model, words.samples)
    with closing(VLLMEngine(spec)) as engine:
        ways = {
            "vllm.LLM.generate": _bare(engine, spec, requests),
            "VLLMEngine.generate": _ours(engine, requests),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(words.rounds + 1):
            for way, generate in ways.items():
                speeds[way].append(_measure(engine, generate))
    Console().print(_tabulate({way: measured[1:] for way, measured in speeds.items()}, words.model))


def _make_spec(words: argparse.Namespace) -> EngineSpec:
    use_gpu = torch.cuda.is_available()
    return EngineSpec(
        model=ModelRef(words.model),
        adapter=None,
        dtype="bfloat16" if use_gpu else "float32",
        max_model_len=_PROMPT_TOKENS[1] + words.max_tokens,
        max_tokens=words.max_tokens,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        stop_token_ids=(),
        seed=0,
        batch_size=words.batch_size,
        use_gpu=use_gpu,
        num_threads=words.num_threads,
    )


def _make_requests(model: Path, num_samples: int) -> list[Request]:
    numbers = random.Random(0)
    vocab_size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    lengths = [numbers.randint(*_PROMPT_TOKENS) for _ in range(num_samples)]
    prompts = [tuple(numbers.randrange(vocab_size) for _ in range(length)) for length in lengths]
    return [Request(number, "tuned", prompt) for number, prompt in enumerate(prompts)]


def _bare(engine: VLLMEngine, spec: EngineSpec, requests: list[Request]) -> Callable[[], int]:
    from vllm import SamplingParams

    prompts: list[Any] = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
    sampling = SamplingParams(temperature=0, max_tokens=spec.max_tokens, ignore_eos=True, detokenize=False)

    def generate() -> int:
        outputs = engine.llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def _ours(engine: VLLMEngine, requests: list[Request]) -> Callable[[], int]:
    return lambda: sum(len(each.token_ids) for together in engine.generate(requests) for each in together)


def _measure(engine: VLLMEngine, generate: Callable[[], int]) -> float:
    """Return tokens per second, nothing of the prompts being cached."""
    engine.llm.reset_prefix_cache()
    start = time.monotonic()
    num_tokens = generate()
    return num_tokens / (time.monotonic() - start)


def _tabulate(speeds: dict[str, list[float]], model: Path) -> Table:
    bare = statistics.median(speeds["vllm.LLM.generate"])
    table = Table(title=f"{model.name}: tokens per second, and shares of the bare one's")
    table.add_column("way", no_wrap=True)
    for name in ("median", "least", "most", "share"):
        table.add_column(name, justify="right")
    for way, measured in speeds.items():
        median = statistics.median(measured)
        figures = [f"{figure:,.0f}" for figure in (median, min(measured), max(measured))]
        table.add_row(way, *figures, f"{median / bare:.3f}")
    return table


if __name__ == "__main__":
    main()

"""Sampled answers that follow from the seed and the sample alone, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def sample_seed(seed: int, sample: int) -> int:
    """Return the seed of one sample's answers, below 2³²."""
    return int(np.random.SeedSequence((seed, sample)).generate_state(1)[0])


def sampling_processors(
    seeds: Sequence[int], prompt_length: int, num_tokens: int, temperature: float, top_k: int, top_p: float
) -> list[Any]:
    """Return the logits processors with which a greedy `generate` samples each row [B] by its own seed.

    `prompt_length` is that of the padded prompts, `num_tokens` how many may be generated at most.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    processors: list[Any] = [TemperatureLogitsWarper(temperature)]
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return [*processors, _SeededChoice(seeds, prompt_length, num_tokens)]


class _SeededChoice:
    """Leaves each row one token: the one in whose share of the probability the row's next random number falls."""

    def __init__(self, seeds: Sequence[int], prompt_length: int, num_tokens: int) -> None:
        import torch

        self._start = prompt_length
        # Drawn in advance, on the CPU: what a row draws depends neither on the device nor on when others end.
        self._numbers_BT = torch.stack(
            [
                torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                for seed in seeds
            ]
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [B, V] with all but the chosen token at −∞; `input_ids` [B, T] are those so far."""
        import torch

        numbers_B = self._numbers_BT[:, input_ids.shape[1] - self._start].to(scores.device)
        reached_BV = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        # Of what was really summed: that may be a little less than 1.
        chosen_B = torch.searchsorted(reached_BV, (numbers_B * reached_BV[:, -1])[:, None], right=True)[:, 0]
        left_BV = torch.full_like(scores, -torch.inf)
        return left_BV.scatter(1, chosen_B.clamp(max=scores.shape[1] - 1)[:, None], 0.0)

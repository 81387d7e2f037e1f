"""What a proof has shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tunesmith.errors import ExportError

# Of the largest logit: sums of float32 in another order differ by less, a merge that is another model by more.
_MERGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Proof:
    """An export was held against what it was made from, and agrees.

    `way`: `whole` compared every weight with an independent merge, and logits; `sampled` some rows of some
    tensors, where memory doesn't hold the model; `copied` the bytes of an adapter by itself.
    `num_inexact` of the `num_weights` compared are off by one unit of rounding; shared ones count once.
    The rest is of `whole` alone: `logits_error` is the largest difference to the logits of the rounded
    merge; `distance` that to the unrounded tuned model, over `num_positions` tokens of real prompts, of
    which `num_flips` have another likeliest next token.
    """

    way: Literal["whole", "sampled", "copied"]
    num_weights: int
    num_inexact: int
    logits_error: float | None = None
    distance: float | None = None
    num_positions: int | None = None
    num_flips: int | None = None

    def describe(self) -> str:
        """Return in one line what was compared, and how far the export is from the tuned model."""
        if self.way == "copied":
            return "the adapter's weights are the checkpoint's, byte for byte"
        rounding = f", {self.num_inexact:,} of them off by one unit of rounding" if self.num_inexact else ""
        if self.distance is None:
            return (
                f"a sample of {self.num_weights:,} weights equals a second computation of the merge{rounding}"
            )
        return (
            f"all {self.num_weights:,} weights equal an independent merge{rounding}; logits agree with it to "
            f"{self.logits_error:.1e}, and are {self.distance:.2e} from the tuned model's at most, with another "
            f"likeliest token at {self.num_flips} of {self.num_positions} positions"
        )


def check_close(what: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a merge whose logits aren't those of the model and its adapter, but for the order of their sums.

    Raises:
        ExportError: they differ.
    """
    error = float((logits - expected).abs().max())
    # NaN fails too.
    if not error <= _MERGE_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ExportError(
            f"{what} isn't the tuned model: its logits differ by {error:.3g} from those of the model with its adapter",
            "nothing was put in place; export the adapter by itself with --no_merge",
        )

"""Weights against weights: equal, or apart by the rounding of a sum."""

from __future__ import annotations

import torch

from tunesmith.errors import ExportError

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Two sums in float32 of the same numbers, in another order, where large ones cancel.
_CANCELLATION = 1e-6


def count_inexact(name: str, found: torch.Tensor, expected: torch.Tensor) -> int:
    """Return how many of the weights `found` are not bit for bit as `expected`, of the same type.

    A weight may be off by one unit of rounding, or by a millionth of the tensor's largest weight.

    Raises:
        ExportError: one is off by more, or the shapes differ.
    """
    if found.shape != expected.shape:
        raise _wrong(name, f"has the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    differs = found != expected
    if not differs.any():
        return 0
    differing, wanted = found[differs], expected[differs]
    if differing.is_floating_point():
        units = (_rank(differing) - _rank(wanted)).abs()
        distance = (differing.double() - wanted.double()).abs()
        close = (units <= 1) | (distance <= _CANCELLATION * expected.abs().max().double())
    else:
        close = torch.zeros(len(differing), dtype=torch.bool)
    if not close.all():
        worst = float((differing.double() - wanted.double()).abs().max())
        raise _wrong(
            name, f"differs in {int((~close).sum()):,} of {found.numel():,} weights, by up to {worst:.3g}"
        )
    return len(differing)


def _rank(values: torch.Tensor) -> torch.Tensor:
    """Return each number's place among all numbers of its type, so that neighbours are 1 apart."""
    bits = values.view(_INTEGERS[values.itemsize]).long()
    magnitude = bits & torch.iinfo(_INTEGERS[values.itemsize]).max
    return torch.where(bits < 0, -magnitude, magnitude)


def _wrong(name: str, what: str) -> ExportError:
    return ExportError(
        f"the export isn't the tuned model: `{name}` {what}",
        "nothing was put in place; try again, and check the disk and the memory if it happens again",
    )

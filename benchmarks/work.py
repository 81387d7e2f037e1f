"""What the operations of a step cost a GPU by stated rates: FLOP, bytes, milliseconds.

Only shapes are looked at, so that tensors without data will do. An operation's bytes are those of what it reads and
writes; views are free. Nothing else is: launches, waits and what caches save count as nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tunesmith.planning.live_bytes import AnswersNo

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "add_product"}
DRAWS = {"bernoulli", "bernoulli_", "random_", "uniform_", "rand", "rand_like"}
_ATTENTION, _ATTENTION_BACKWARD = "_varlen_attn", "_varlen_attn_backward"
# Its backward pass computes five products where the forward pass does two.
_BACKWARD_FACTOR = 2.5

# What they write into isn't read before.
_OVERWRITES = {"copy_", "fill_", "zero_", "bernoulli_", "random_", "uniform_"}
# Of their first tensor they touch what the others name.
_GATHERS = {"embedding", "index_select", "gather", "index"}
_SCATTERS = {"scatter_add_", "index_copy_"}
# Of what they are given they look at the shape alone.
_FILLS = {"new_full", "new_zeros", "new_ones", "full_like", "zeros_like", "ones_like", "rand_like"}
# They return zeros but for what they copy into them.
_PADS = {"select_backward", "slice_backward"}
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach"}
_FREE |= {"_reshape_alias", "lift_fresh"}


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second: FLOP of products and of attention, bytes, random numbers, sums of 64-bit integers."""

    products: float = 680e12
    attention: float = 400e12
    attention_backward: float = 330e12
    memory: float = 2.6e12
    draws: float = 2.5e11
    integers: float = 5e12


# FlashAttention 2; FlashAttention 3.
H100 = Rates()
H100_FLASH_3 = Rates(attention=580e12, attention_backward=460e12)


@dataclass(frozen=True)
class Work:
    """What something costs; `seconds` is the longest that FLOP, bytes or draws take, one operation after another."""

    seconds: float = 0.0
    flops: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.seconds + other.seconds, self.flops + other.flops, self.num_bytes + other.num_bytes)

    def times(self, factor: float) -> Work:
        return Work(factor * self.seconds, factor * self.flops, factor * self.num_bytes)


Works = dict[str, Work]


def add(works: Works, others: Works, factor: float = 1.0) -> Works:
    """Return the sum of both, by operation, `others` so many times."""
    names = [*works, *(name for name in others if name not in works)]
    return {name: works.get(name, Work()) + others.get(name, Work()).times(factor) for name in names}


def total(works: Works) -> Work:
    return sum(works.values(), Work())


class WorkCounter(AnswersNo):
    """Counts the work of the operations inside, by name; what a compiler looks at is none."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.works: Works = {}
        self._is_paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        if not self._is_paused:
            self.add(name_of(func), measure_operation(func, args, kwargs or {}, outputs, self.rates))
        return outputs

    def add(self, name: str, work: Work) -> None:
        if work != Work():
            self.works[name] = self.works.get(name, Work()) + work

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let what runs inside count as nothing: whoever runs it counts it."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before


def name_of(func: Any) -> str:
    return str(func._schema.name).split("::")[1]


def measure_operation(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, rates: Rates
) -> Work:
    """Return the work of one call."""
    name = name_of(func)
    if func.is_view or name in _FREE:
        return Work()
    num_bytes = _count_bytes(func, args, kwargs, outputs)
    flops, rate = 0.0, rates.products
    if name in PRODUCTS:
        first, second = [arg for arg in args if isinstance(arg, Tensor)][-2:]
        flops = 2.0 * first.numel() * second.shape[-1]
    elif name == _ATTENTION:
        flops, rate = _count_attention_flops(*args), rates.attention
    elif name == _ATTENTION_BACKWARD:
        _, query, key, value, _, _, starts, key_starts, longest, longest_key, is_causal, *_ = args
        of_forward = _count_attention_flops(
            query, key, value, starts, key_starts, longest, longest_key, is_causal
        )
        flops, rate = _BACKWARD_FACTOR * of_forward, rates.attention_backward
    num_draws = sum(tensor.numel() for tensor in _tensors(outputs)) if name in DRAWS else 0
    seconds = max(flops / rate, num_bytes / rates.memory, num_draws / rates.draws)
    if name == "addmm" and args[0].dim() == 2:  # copied before to where the product is added to it
        num_copied = 2 * count(args[0])
        return Work(seconds + num_copied / rates.memory, flops, float(num_bytes + num_copied))
    return Work(seconds, flops, float(num_bytes))


def _count_attention_flops(
    query_THD: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    is_causal: bool = False,
    scale: float | None = None,
    window: list[int] | None = None,
    *_: Any,
) -> float:
    """Return the FLOP of two products a head over examples that are all as long as the longest."""
    if not (is_causal or (window is not None and window[1] == 0)):
        return 4.0 * query_THD.numel() * longest
    # How far each of them sees back, on average.
    left = longest if window is None or window[0] < 0 else min(window[0] + 1, longest)
    seen = left * (1 - left / (2 * longest))
    return 4.0 * query_THD.numel() * seen


def count(tensor: Tensor) -> int:
    """Return the bytes of a tensor, those that it repeats once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _count_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> int:
    name, schema = name_of(func), func._schema
    inputs = _tensors((args, kwargs))
    made = sum(map(count, _tensors(outputs)))
    if name in _FILLS:
        return made
    if name in _GATHERS:
        return 2 * made + sum(map(count, inputs[1:]))
    if name in _SCATTERS:
        return 3 * count(inputs[-1]) + sum(map(count, inputs[1:-1]))
    if name in _PADS:
        return made + 2 * sum(map(count, inputs))
    num_bytes = 0 if any(one.alias_info for one in schema.returns) else made
    for argument, value in [
        *zip(schema.arguments, args, strict=False),
        *((one, kwargs[one.name]) for one in schema.arguments if one.name in kwargs),
    ]:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        # What is named as an output comes by its name alone.
        is_read = not is_written or not (argument.kwarg_only or name in _OVERWRITES)
        num_bytes += (is_read + is_written) * sum(map(count, _tensors(value)))
    return num_bytes

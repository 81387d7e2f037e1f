"""What a compiled block costs a GPU: its graphs, with pointwise operations and reductions fused as inductor does.

The graphs are those that AOTAutograd hands a compiler, forward and backward, decomposed by inductor's table and cut by
its min-cut partitioner. They run operation by operation on tensors without data, and are then cut into kernels:

- A product, attention, and whatever else isn't named below is a kernel of its own: what it takes and makes lies in
  memory.
- A pointwise operation (casts, cat and indexing among them) joins the kernels that make its inputs, and a reduction
  along the last dimensions the one that makes its input, if all run over the same rows and columns: a kernel that
  reduces R·C elements to R holds operations on R·C and on R elements, another one on equally many. None joins where
  a third kernel lies between them.
- Kernels of which neither needs the other join if they run over the same rows and columns and read a tensor in common
  that is as large.
- A pointwise operation that a single other one takes is computed there, whatever its size; constants are, too.

A kernel reads each tensor from outside once, and writes what is taken outside. Reading a row again after a reduction
over it is free: it lies in the cache.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from work import DRAWS, Work, WorkCounter, count, measure_operation, name_of

from tunesmith.compat import storage_key

_REDUCTIONS = {"sum", "mean", "amax", "amin", "any", "all"}
_CONSTANTS = {
    "full",
    "full_like",
    "zeros",
    "zeros_like",
    "new_zeros",
    "ones_like",
    "scalar_tensor",
    "iota",
    "arange",
}
_CONSTANTS |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_INDEXING = {"index", "index_select", "gather", "embedding"}
_MOVES = {
    "cat",
    "clone",
    "_to_copy",
    "convert_element_type",
    "slice_scatter",
    "select_scatter",
    "constant_pad_nd",
}
_POINTWISE = _INDEXING | _MOVES | {"rand", "rand_like"}


def counting_backend(counter: WorkCounter) -> Callable[..., Any]:
    """Return a backend of torch.compile whose graphs add the work of their kernels to `counter` whenever they run."""

    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            recorder = _Recorder(graph)
            with counter.paused():
                outputs = recorder.run(*args)
            for kernel in fuse(list(recorder.calls.values())):
                counter.add(*kernel.measure(counter))
            return outputs

        return make_boxed_func(run)

    return aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )


@dataclass(eq=False)
class _Call:
    """One operation of a graph, or an input of it (without `func`), as it ran."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    inputs: list[_Call]
    users: list[_Call] = field(default_factory=list)
    is_returned: bool = False

    @property
    def name(self) -> str:
        return name_of(self.func) if hasattr(self.func, "_schema") else ""

    @property
    def is_view(self) -> bool:
        return (
            self.func is operator.getitem
            or self.name == "_unsafe_view"
            or getattr(self.func, "is_view", False)
        )

    @property
    def is_pointwise(self) -> bool:
        is_tagged = torch.Tag.pointwise in getattr(self.func, "tags", ())
        return isinstance(self.output, Tensor) and (is_tagged or self.name in _POINTWISE)

    @property
    def is_constant(self) -> bool:
        return self.name in _CONSTANTS

    @property
    def sources(self) -> list[_Call]:
        """The calls that made what is read, views seen through."""
        return [one for each in self.inputs for one in (each.sources if each.is_view else [each])]

    @property
    def takers(self) -> Iterator[_Call | None]:
        """The calls that read what this one makes, views seen through; None: the graph returns it."""
        if self.is_returned:
            yield None
        for user in self.users:
            if user.is_view:
                yield from user.takers
            else:
                yield user


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps its calls."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.calls: dict[fx.Node, _Call] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.auto_functionalized_v2:
            return None, *kwargs["_all_bases"]  # changed in place: of tensors without data nothing changes
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        inputs = [self.calls[each] for each in n.all_input_nodes]
        if n.op == "output":
            for each in inputs:
                each.is_returned = True
            return output
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        func = n.target if n.op == "call_function" else None
        if func is torch.ops.higher_order.auto_functionalized_v2:
            func, args, kwargs = _in_place(*args, **kwargs)
        self.calls[n] = call = _Call(func, args, kwargs, output, inputs)
        for each in inputs:
            each.users.append(call)
        return output


def _in_place(func: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the call that inductor makes of one that a graph holds without changes in place."""
    bases = kwargs.pop("_all_bases")
    named = {argument.name: kwargs.get(argument.name) for argument in func._schema.arguments}
    named |= {name: bases[kwargs[f"_{name}_base_index"]] for name in named if f"_{name}_base_index" in kwargs}
    return func, tuple(named.values()), {}


@dataclass(eq=False)
class Kernel:
    """Calls that run at once, over `elements` elements; `rows`: what it reduces them to, None if it doesn't."""

    calls: list[_Call]
    elements: int
    rows: int | None = None
    is_fused: bool = True

    def measure(self, counter: WorkCounter) -> tuple[str, Work]:
        """Return its name and its work."""
        if not self.is_fused:
            (call,) = self.calls
            return call.name, measure_operation(call.func, call.args, call.kwargs, call.output, counter.rates)
        num_bytes = sum(self._count_reads()) + sum(count(call.output) for call in self._kept())
        num_draws = sum(call.output.numel() for call in self.calls if call.name in DRAWS)
        num_integers = sum(
            call.output.numel()
            for call in self.calls
            if call.is_pointwise and call.output.dtype == torch.int64
        )
        rates = counter.rates
        seconds = max(num_bytes / rates.memory, num_draws / rates.draws, num_integers / rates.integers)
        return "fused", Work(seconds, 0.0, float(num_bytes))

    def reads(self) -> Iterator[Tensor]:
        """Yield what it reads of each tensor from outside, as often as it is named."""
        for call in self.calls:
            for each in call.inputs:
                if isinstance(each.output, Tensor) and not _is_inside(each, self.calls):
                    is_picked = call.name in _INDEXING and each is call.inputs[0]
                    yield call.output if is_picked else each.output

    def _count_reads(self) -> Iterator[int]:
        """Yield the bytes read of each storage: of views that lie otherwise together, and no more than it has."""
        views: dict[int, dict[Any, Tensor]] = {}
        for tensor in self.reads():
            layout = tensor.storage_offset(), tensor.shape, tensor.stride()
            views.setdefault(storage_key(tensor.untyped_storage()), {})[layout] = tensor
        for found in views.values():
            tensors = list(found.values())
            yield min(sum(map(count, tensors)), tensors[0].untyped_storage().nbytes())

    def _kept(self) -> Iterator[_Call]:
        """Yield the calls whose results are taken outside."""
        inside = set(self.calls)
        return (call for call in self.calls if any(taker not in inside for taker in call.takers))


def _is_inside(call: _Call, calls: Sequence[_Call]) -> bool:
    return all(source in calls or source.is_constant for source in (call.sources if call.is_view else [call]))


def fuse(calls: Iterable[_Call]) -> list[Kernel]:
    """Return the kernels that a graph's calls are run as."""
    kernel_of: dict[_Call, Kernel] = {}
    for call in calls:
        if (
            call.func is None
            or call.is_view
            or call.is_constant
            or not isinstance(call.func, torch._ops.OpOverload)
        ):
            continue
        if _is_inlined(call):
            continue
        kernel = _own_kernel(call)
        kernel.calls[:0] = _inlined(call)
        kernel_of.update(dict.fromkeys(kernel.calls, kernel))
        for source in [source for each in kernel.calls for source in reversed(each.sources)]:
            if source in kernel_of:
                _join(kernel_of[source], kernel_of[call], kernel_of)
    while any(
        _join(first, second, kernel_of)
        for first, second in itertools.combinations(dict.fromkeys(kernel_of.values()), 2)
        if first.is_fused and second.is_fused and _read_alike(first, second)
    ):
        pass
    return list(dict.fromkeys(kernel_of.values()))


def _is_inlined(call: _Call) -> bool:
    """Return whether a call is computed where it is taken."""
    takers = set(call.takers)
    if not call.is_pointwise or len(takers) != 1:
        return False
    (taker,) = takers
    return taker is not None and taker.is_pointwise and taker.output.numel() != call.output.numel()


def _inlined(call: _Call) -> list[_Call]:
    """Return the calls that are computed where this one is, in order."""
    if not call.is_pointwise:
        return []
    found = [source for source in call.sources if _is_inlined(source)]
    return list(dict.fromkeys(one for source in found for one in (*_inlined(source), source)))


def _own_kernel(call: _Call) -> Kernel:
    if call.is_pointwise:
        return Kernel([call], call.output.numel())
    if call.name in _REDUCTIONS and isinstance(call.output, Tensor) and _reduces_last(call):
        return Kernel([call], call.args[0].numel(), call.output.numel())
    return Kernel([call], 0, is_fused=False)


def _reduces_last(call: _Call) -> bool:
    values = call.args[0]
    dims = call.args[1] if len(call.args) > 1 and call.args[1] else range(values.dim())
    reduced = sorted(dim % values.dim() for dim in ([dims] if isinstance(dims, int) else dims))
    return reduced == list(range(values.dim() - len(reduced), values.dim()))


def _join(first: Kernel, second: Kernel, kernel_of: dict[_Call, Kernel]) -> bool:
    """Make one kernel of both, if it may be; return whether it was."""
    if first is second or not (first.is_fused and second.is_fused):
        return False
    size = _common_size(first, second)
    if size is None or _lies_between(first, second, kernel_of) or _lies_between(second, first, kernel_of):
        return False
    first.calls += second.calls
    first.elements, first.rows = size
    kernel_of.update(dict.fromkeys(second.calls, first))
    return True


def _common_size(first: Kernel, second: Kernel) -> tuple[int, int | None] | None:
    """Return the elements and rows of both together; None: they don't run over the same."""
    if first.elements == second.elements:
        if first.rows is not None and second.rows is not None and first.rows != second.rows:
            return None
        return first.elements, second.rows if first.rows is None else first.rows
    for wide, narrow in ((first, second), (second, first)):
        if wide.rows == narrow.elements and narrow.rows is None:
            return wide.elements, wide.rows
    return None


def _lies_between(first: Kernel, second: Kernel, kernel_of: dict[_Call, Kernel]) -> bool:
    """Return whether `second` needs `first` by way of a third kernel."""
    waiting = [kernel for kernel in _needed(second, kernel_of) if kernel is not first]
    seen = set(map(id, waiting))
    while waiting:
        for kernel in _needed(waiting.pop(), kernel_of):
            if kernel is first:
                return True
            if id(kernel) not in seen:
                seen.add(id(kernel))
                waiting.append(kernel)
    return False


def _needed(kernel: Kernel, kernel_of: dict[_Call, Kernel]) -> list[Kernel]:
    found = (kernel_of.get(source) for call in kernel.calls for source in call.sources)
    return [each for each in dict.fromkeys(found) if each is not None and each is not kernel]


def _read_alike(first: Kernel, second: Kernel) -> bool:
    """Return whether both read a tensor that is as large as what they run over."""
    ours, theirs = (
        {
            storage_key(tensor.untyped_storage())
            for tensor in kernel.reads()
            if tensor.numel() == kernel.elements
        }
        for kernel in (first, second)
    )
    return bool(ours & theirs)

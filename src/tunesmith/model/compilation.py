"""torch.compile, block by block: blocks of one kind share what is compiled."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.compat import compilation_error, set_most_variants
from tunesmith.errors import ResourceError
from tunesmith.parallel.blocks import find_blocks

logger = logging.getLogger(__name__)

# Every kind of block compiles anew for inputs with and without a gradient, in training and in evaluation;
# torch gives up after 8.
_MOST_VARIANTS = 64

# What torch compiles with.
BACKEND = "inductor"


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where what torch compiles with is missing.

    Raises:
        ResourceError: with what to install.
    """
    if device.type == "cpu":
        default = "clang++" if sys.platform == "darwin" else "g++"
        compilers = [os.environ.get("CXX", default)]
    else:
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        raise _missing(f"the compiler {' or '.join(f'`{name}`' for name in compilers)}", "build-essential")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise _missing(f"`{header}`", "python3-dev")
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        raise ResourceError(
            "`torch_compile` is set, but the package triton is absent",
            "install a torch for CUDA, or leave `torch_compile` out",
        )


def keep_compiled(folder: Path) -> None:
    """Let torch keep what it compiles in `folder`, where a worker that is started again finds it, on whatever machine.

    A folder that the environment names is left alone.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compile_blocks(model: nn.Module, backend: Any = None, dynamic: bool = True) -> None:
    """Let torch compile the blocks of `model`, sharded or not, when they are first run; a failure is warned of.

    What they were run with before, such as short rows to try the attention with, isn't compiled. `backend` is
    torch.compile's; with `dynamic` one graph does for all lengths.
    """
    set_most_variants(_MOST_VARIANTS)
    attempt = _Attempt()
    for block in find_blocks(model):
        # Not the module: what FSDP does before and after it stays outside.
        compiled = torch.compile(block.forward, dynamic=dynamic, backend=backend or BACKEND)
        block.forward = _Forward(block.forward, compiled, attempt)


@dataclass
class _Attempt:
    """Whether torch failed to compile one of a model's blocks."""

    has_failed: bool = False


class _Forward:
    """A block's forward, compiled; where torch can't compile it, the block's own.

    Ranks may differ in that: what they exchange lies outside, and both compute the same but for rounding.
    """

    def __init__(self, plain: Callable[..., Any], compiled: Callable[..., Any], attempt: _Attempt) -> None:
        self._plain, self._compiled, self._attempt = plain, compiled, attempt
        # None: not run yet. A block that was compiled stays so: a recomputation must keep what the first pass kept.
        self._is_compiled: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_compiled is None and self._attempt.has_failed:
            self._is_compiled = False
        if self._is_compiled is False:
            return self._plain(*args, **kwargs)
        try:
            output = self._compiled(*args, **kwargs)
        except compilation_error() as error:
            reason = " ".join(str(error).split("\n")[:2])  # where it failed, and why
            logger.warning(
                "torch can't compile the model's blocks: on this worker they run plainly, slower and with the same "
                "results but for rounding: %s: %s",
                type(error).__name__,
                reason,
            )
            self._attempt.has_failed, self._is_compiled = True, False
            return self._plain(*args, **kwargs)
        self._is_compiled = True
        return output


def _missing(what: str, package: str) -> ResourceError:
    return ResourceError(
        f"`torch_compile` is set, but {what} is absent",
        f"install it where the model runs (Debian: {package}), or leave `torch_compile` out",
    )

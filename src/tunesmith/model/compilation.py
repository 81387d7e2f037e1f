"""torch.compile, block by block: blocks of one kind share what is compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.compat import set_most_variants
from tunesmith.errors import ResourceError
from tunesmith.parallel.blocks import find_blocks

# Every kind of block compiles anew for inputs with and without a gradient, in training and in evaluation;
# torch gives up after 8.
_MOST_VARIANTS = 64


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


def compile_blocks(model: nn.Module, backend: Any = "inductor", dynamic: bool = True) -> None:
    """Let torch compile the blocks of `model`, sharded or not, when they are first run; `backend` is torch.compile's.

    What they were run with before, such as short rows to try the attention with, isn't compiled.
    """
    set_most_variants(_MOST_VARIANTS)
    for block in find_blocks(model):
        # Not the module: what FSDP does before and after it stays outside. Lengths differ from row to row.
        block.forward = torch.compile(block.forward, dynamic=dynamic, backend=backend)


def _missing(what: str, package: str) -> ResourceError:
    return ResourceError(
        f"`torch_compile` is set, but {what} is absent",
        f"install it where the model runs (Debian: {package}), or leave `torch_compile` out",
    )

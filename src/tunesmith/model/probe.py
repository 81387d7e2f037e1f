"""Does the model at hand keep packed examples apart?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

_LENGTHS = (7, 11, 9)


@torch.no_grad()
def keeps_examples_apart(model: nn.Module, vocab_size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether, in a packed sequence, no example sees another, and each is computed as if alone.

    Three examples are packed. Changing the middle one must leave the logits of its neighbours as they
    are, and each neighbour alone must give the logits it has in the pack.

    Collective under FSDP: every rank must call it. Leaves the model in the mode it was in.
    """
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(vocab_size, (length,), generator=generator) for length in _LENGTHS]
    changed = [examples[0], torch.randint(vocab_size, (_LENGTHS[1],), generator=generator), examples[2]]
    was_training = model.training
    model.eval()
    first, _, last = _packed_logits(model, examples, device)
    first_changed, _, last_changed = _packed_logits(model, changed, device)
    (first_alone,) = _packed_logits(model, [examples[0]], device)
    (last_alone,) = _packed_logits(model, [examples[2]], device)
    model.train(was_training)
    if isinstance(model, FSDPModule):
        # A forward leaves the outermost weights gathered, and an optimizer made now would miss their slices.
        model.reshard()
    rounding = 1e-4 if dtype == torch.float32 else 5e-2
    unmoved = all(_distance(a, b) < rounding / 10 for a, b in ((first, first_changed), (last, last_changed)))
    alone = all(_distance(a, b) < rounding for a, b in ((first, first_alone), (last, last_alone)))
    return unmoved and alone


def _packed_logits(model: Any, examples: list[Tensor], device: torch.device) -> list[Tensor]:
    input_ids_1T = torch.cat(examples).unsqueeze(0).to(device)
    position_ids_1T = torch.cat([torch.arange(len(example)) for example in examples]).unsqueeze(0).to(device)
    logits_1TV = model(input_ids=input_ids_1T, position_ids=position_ids_1T, use_cache=False).logits
    return list(logits_1TV[0].float().split([len(example) for example in examples]))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())

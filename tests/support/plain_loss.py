"""Labels and loss with transformers alone: what ours is held against. Nothing here comes from the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

Item = dict[str, torch.Tensor]


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, path: Path) -> float:
    """Return the loss per trained token, in nats, of a set's .jsonl file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = [encode(tokenizer, row["input"], row["output"]) for row in rows]
    num_trained = sum(int((item["labels"] != -100).sum()) for item in items)
    model.eval()
    losses = [model(**batch, num_items_in_batch=num_trained).loss.item() for batch in pad(items, 8)]
    return float(sum(losses))


def encode(tokenizer: Any, prompt: str, completion: str) -> Item:
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True, add_special_tokens=False)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    labels = [
        token if start >= len(prompt) else -100
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([*labels, tokenizer.eos_token_id])}


def pad(items: list[Item], size: int) -> Iterator[Item]:
    """Yield batches with one example a row, padded on the right and masked."""
    for first in range(0, len(items), size):
        batch = items[first : first + size]
        ids, labels, mask = (
            torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
            for tensors, value in (
                ([item["input_ids"] for item in batch], 0),
                ([item["labels"] for item in batch], -100),
                ([torch.ones_like(item["input_ids"]) for item in batch], 0),
            )
        )
        yield {"input_ids": ids, "labels": labels, "attention_mask": mask}

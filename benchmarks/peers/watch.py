"""What is measured of a Hugging Face Trainer while it trains, by any of its subclasses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback
from turn import Figures, Task, age_s


class Watch(TrainerCallback):
    """Times a Trainer's steps and measures its loss on the held-out rows.

    A step's time runs from the end of the one before it, so that the wait for its batch counts.
    """

    def __init__(self, task: Task) -> None:
        self.figures = Figures()
        self._task = task
        self._evaluated: list[tuple[float, int]] = []

    def run(self, trainer: Trainer) -> None:
        """Evaluate, train, and answer with what was measured."""
        self._trainer = trainer
        trainer.add_callback(self)
        self.figures.start_s = age_s()
        self.figures.loss_before = self._evaluate()
        trainer.train()
        self.figures.answer()

    def note(self, is_training: bool, loss: Tensor, counts: tuple[int, int, int]) -> None:
        """Record the mean loss of one batch, and its examples, tokens and trained tokens."""
        examples, tokens, trained_tokens = counts
        if not is_training:
            self._evaluated.append((loss.item(), trained_tokens))
            return
        self.figures.losses.append(loss.item())
        self.figures.examples.append(examples)
        self.figures.tokens.append(tokens)
        self.figures.trained_tokens.append(trained_tokens)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.figures.step_s.append(time.perf_counter() - self._since)
        if self.figures.is_halfway(self._task):
            self.figures.loss_after = self._evaluate()
        self._since = time.perf_counter()

    def _evaluate(self) -> float:
        self._evaluated.clear()
        self._trainer.evaluate()
        total = sum(count for _, count in self._evaluated)
        self.figures.held_out_trained_tokens = total
        return sum(loss * count for loss, count in self._evaluated) / total


def watched(trainer_class: type[Trainer], watch: Watch) -> type[Trainer]:
    """Return the Trainer with a `compute_loss` that tells `watch` of each batch."""

    class Watched(trainer_class):  # type: ignore[valid-type,misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            counts = count_batch(inputs)
            computed = super().compute_loss(model, inputs, *args, **kwargs)
            loss = computed[0] if isinstance(computed, tuple) else computed
            watch.note(model.training, loss.detach(), counts)
            return computed

    return Watched


def count_batch(inputs: dict[str, Any]) -> tuple[int, int, int]:
    """Return the examples, tokens and trained tokens of a batch; a flattened one has positions that restart."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    trained = int((inputs["labels"][:, 1:] != -100).sum())
    if mask is None:
        return int((inputs["position_ids"] == 0).sum()), ids.numel(), trained
    return len(ids), int(mask.sum()), trained


def common_arguments(task: Task, folder: str) -> dict[str, Any]:
    """Return the arguments that every Trainer is given."""
    return {
        "output_dir": folder,
        "max_steps": task.num_steps,
        "per_device_train_batch_size": task.batch_size,
        "per_device_eval_batch_size": task.batch_size,
        "prediction_loss_only": True,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": True,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def read_rows(path: str) -> Iterable[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]

"""A new objective is one file: here a throwaway one goes through a training.

Shapes: E examples of a batch, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.runs import losses, small_config, start, train_here, train_on_rank
from support.workers import WorkerGroup
from tunesmith.data.batches import Batch, BatchPlan, Counts, GlobalBatch, Sequences
from tunesmith.data.prepare import open_prepared
from tunesmith.model.adapters.lora import add_adapters
from tunesmith.model.load import load_model
from tunesmith.objectives.base import LOSS, LossOutput, TokenLogProbs
from tunesmith.train.worker import TrainJob

pytestmark = pytest.mark.usefixtures("alone")

WANTED = -20.0


@dataclass(frozen=True)
class Deviation:
    """How far an answer's log-prob is from the wanted one: the mean square over pairs of examples, half weighted."""

    weight: float = 0.5

    def denominators(self, counts: Counts) -> dict[str, int]:
        return {LOSS: counts.examples // 2, "log_prob": counts.examples}

    def loss(self, batch: Batch, counts: Counts, policy: TokenLogProbs) -> LossOutput:
        log_probs_N = policy(batch)
        of_examples_N = torch.bucketize(batch.positions_N, batch.starts[1:], right=True)
        answers_E = log_probs_N.new_zeros(len(batch.starts) - 1).index_add(0, of_examples_N, log_probs_N)
        # A row's padding is an example without targets.
        has_targets_E = torch.zeros_like(answers_E).index_fill(0, of_examples_N, 1.0)
        deviations_E = has_targets_E * (answers_E - WANTED) ** 2
        return LossOutput(self.weight * deviations_E.sum(), {"log_prob": answers_E.sum()})


@pytest.mark.parametrize("full_ft", [False, True])
def test_an_objective_of_one_s_own_is_trained_and_logged(
    full_ft: bool, model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    changes = {"full_ft": full_ft, "max_grad_norm": 0.0, "lora_dropout": 0.0}
    job = start(small_config(model_of("llama"), rows, tmp_path, **changes))
    run = train_here(replace(job, objective=Deviation()))
    loss, log_prob, norm = compute_plainly(job)
    assert losses(run)[1] == pytest.approx(loss, rel=1e-5)
    assert losses(run, "log_prob")[1] == pytest.approx(log_prob, rel=1e-5)
    assert losses(run, "grad_norm")[1] == pytest.approx(norm, rel=1e-5)
    assert losses(run)[4] < losses(run)[1]
    assert losses(run, "eval_loss").keys() == losses(run, "eval_log_prob").keys() == {0, 2, 4}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"fsdp": "full_shard"}, {"full_ft": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # whose head is tied to the embeddings, and isn't
def test_two_workers_train_it_as_one(
    family: str,
    changes: dict[str, Any],
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    two_workers: WorkerGroup,
) -> None:
    # Of three microbatches a step the second worker runs one, and an empty one.
    settings = {"gradient_accumulation_steps": 3, "packing": False, "learning_rate": 1e-3, **changes}
    jobs = [
        start(small_config(model_of(family), rows, tmp_path / name, **settings)) for name in ("one", "two")
    ]
    one, two = (replace(job, objective=Deviation()) for job in jobs)
    first, second = train_here(one), two_workers.run(train_on_rank, two)[0]
    for name in ("loss", "log_prob", "grad_norm", "eval_loss", "eval_log_prob"):
        assert losses(first, name) == pytest.approx(losses(second, name), rel=1e-4), name


def compute_plainly(job: TrainJob) -> tuple[float, float, float]:
    """Return the first step's loss, mean log-prob and gradient norm, an example at a time."""
    tokens = open_prepared(job.prepared_path).train
    sequences = Sequences(tokens, packing=True, pad_token_id=0)
    plan = BatchPlan(len(sequences), GlobalBatch(**job.run.read_params()["global_batch"]), job.config.seed)
    examples = sequences.examples(np.concatenate(plan.microbatches(1)))
    model: torch.nn.Module = load_model(job.config.model, torch.device("cpu"), torch.float32, "sdpa")
    if not job.config.full_ft:
        model = add_adapters(model, job.config)
    answers = [log_prob_of(model, *tokens.example(example)) for example in examples]
    loss = sum(0.5 * (answer - WANTED) ** 2 for answer in answers) / (len(examples) // 2)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return loss.item(), sum(answer.item() for answer in answers) / len(examples), norm.item()


def log_prob_of(model: torch.nn.Module, ids_T: np.ndarray, trained_T: np.ndarray) -> Tensor:
    ids_1T = torch.from_numpy(ids_T.astype(np.int64)).unsqueeze(0)
    log_probs_TV = model(input_ids=ids_1T).logits[0, :-1].log_softmax(-1)
    chosen_T1 = log_probs_TV.gather(1, ids_1T[0, 1:].unsqueeze(1))
    return chosen_T1[torch.from_numpy(np.asarray(trained_T[1:], dtype=bool))].sum()

"""The loss of every step equals that of a plain loop of PyTorch, transformers and PEFT, written apart from ours.

The plain loop takes from ours the order of the examples alone: that defines the batches. Texts come from
training.jsonl, labels are made here, the loss is transformers' own, and so is the learning rate's schedule.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_with_min_lr_schedule_with_warmup

from support.plain_loss import encode, pad
from support.runs import losses, small_config, start, train_here
from support.tiny_models import FAMILIES
from tunesmith.data.batches import BatchPlan, GlobalBatch, Sequences
from tunesmith.data.prepare import open_prepared
from tunesmith.train.worker import TrainJob

pytestmark = [
    pytest.mark.usefixtures("alone"),
    # Meant: the schedule counts steps from 0, ours from 1.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

NUM_STEPS = 9
ATTENTION_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAYERS = {
    "mixtral": ATTENTION_LAYERS,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
ALL_LAYERS = [*ATTENTION_LAYERS, "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in ("llama", "mixtral") else pytest.mark.slow) for name in FAMILIES],
)
def test_the_loss_trace_equals_a_plain_loop_s(
    family: str, full_ft: bool, packing: bool, model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    job = start(
        small_config(
            model_of(family),
            rows,
            tmp_path,
            full_ft=full_ft,
            packing=packing,
            # The prompt ends where a token ends, so that there is nothing to settle about a token across.
            input_template="{instruction}\n",
            lora_dropout=0,
            learning_rate=2e-3,
            min_learning_rate=1e-4,
            warmup_ratio=0.3,
            weight_decay=0.1,
            max_grad_norm=0.5,
            max_steps=NUM_STEPS,
            eval_steps=0,
            # Fewer sequences a step where they are packs, so that there are several steps in an epoch.
            gradient_accumulation_steps=2 if packing else 4,
        )
    )
    run = train_here(job)
    plain = train_plainly(family, job, [read_step(job, step) for step in range(1, NUM_STEPS + 1)])
    assert losses(run) == pytest.approx(plain, rel=0, abs=1e-5)
    assert max(losses(run, "grad_norm").values()) > 0.5
    assert plain[1] - plain[NUM_STEPS] > 0.05


def read_step(job: TrainJob, step: int) -> list[dict[str, str]]:
    """Return the rows of training.jsonl that ours trains on in a step."""
    prepared = open_prepared(job.prepared_path)
    sequences = Sequences(prepared.train, job.config.packing, pad_token_id=0)
    plan = BatchPlan(
        len(sequences), GlobalBatch(**job.run.read_params()["global_batch"]), seed=job.config.seed
    )
    lines = (prepared.data_dir / "training.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [i for microbatch in plan.microbatches(step) for i in sequences.examples(microbatch)]
    return [json.loads(lines[int(prepared.train.rows[i])]) for i in examples]


def train_plainly(family: str, job: TrainJob, steps: list[list[dict[str, str]]]) -> dict[int, float]:
    """Return the loss of each step of a plain loop over these rows, 5 examples a forward."""
    settings: dict[str, Any] = job.config.model_dump()
    tokenizer = AutoTokenizer.from_pretrained(settings["model_path"])
    model = AutoModelForCausalLM.from_pretrained(settings["model_path"], dtype=torch.float32)
    if not settings["full_ft"]:
        torch.manual_seed(settings["seed"])
        lora = LoraConfig(
            r=settings["lora_rank"],
            lora_alpha=settings["lora_alpha"],
            lora_dropout=0.0,
            target_modules=LAYERS.get(family, ALL_LAYERS),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings["weight_decay"]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=settings["learning_rate"],
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=3,  # 0.3 of 9, rounded up
        num_training_steps=NUM_STEPS,
        min_lr=settings["min_learning_rate"],
    )
    trace = {}
    for step, rows in enumerate(steps, start=1):
        items = [encode(tokenizer, row["input"], row["output"]) for row in rows]
        num_trained = sum(int((item["labels"] != -100).sum()) for item in items)
        loss = 0.0
        for batch in pad(items, 5):
            part = model(**batch, num_items_in_batch=num_trained).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, settings["max_grad_norm"])
        schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        trace[step] = loss
    return trace

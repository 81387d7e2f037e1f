"""A turn of transformers' Trainer, set as Ray Train examples for EKS set it.

bfloat16 autocast over the float32 weights that `prepare_model_for_kbit_training` makes, gradient checkpointing,
batches padded to their longest row and a multiple of 8. FSDP, FlashAttention and the data loader's processes
belong to GPUs and are left out; the end token is trained, as everywhere here.
"""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from turn import Task, read_task
from watch import Watch, common_arguments, read_rows, watched

_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    _, task = read_task()
    watch = Watch(task)
    with tempfile.TemporaryDirectory() as folder:
        watch.run(_make_trainer(task, watch, folder))


def _make_trainer(task: Task, watch: Watch, folder: str) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = _make_model(task)
    arguments = TrainingArguments(
        **common_arguments(task, folder),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused",
        remove_unused_columns=False,
    )
    return watched(Trainer, watch)(
        model=model,
        args=arguments,
        train_dataset=_tokenize(task, task.train, tokenizer),
        eval_dataset=_tokenize(task, task.held_out, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model, padding=True, pad_to_multiple_of=8),
        processing_class=tokenizer,
    )


def _make_model(task: Task) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    adapters = LoraConfig(
        r=task.lora_rank,
        lora_alpha=task.lora_alpha,
        lora_dropout=0.0,
        target_modules=_LAYERS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


def _tokenize(task: Task, path: str, tokenizer: AutoTokenizer) -> list[dict[str, list[int]]]:
    rows = []
    for row in read_rows(path):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        num_prompt = len(tokenizer(row["prompt"])["input_ids"])
        labels = [-100] * num_prompt + ids[num_prompt:]
        rows.append({"input_ids": ids[: task.max_length], "labels": labels[: task.max_length]})
    return rows


if __name__ == "__main__":
    main()

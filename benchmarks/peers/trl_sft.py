"""A turn of TRL's SFTTrainer: `default`, `no-checkpointing` or `packed`."""

from __future__ import annotations

import tempfile

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from turn import Task, read_task
from watch import Watch, common_arguments, read_rows, watched

_CHANGES = {
    "default": {},
    "no-checkpointing": {"gradient_checkpointing": False},
    "packed": {"packing": True, "eval_packing": False},
}


def main() -> None:
    way, task = read_task()
    watch = Watch(task)
    with tempfile.TemporaryDirectory() as folder:
        watch.run(_make_trainer(way, task, watch, folder))


def _make_trainer(way: str, task: Task, watch: Watch, folder: str) -> SFTTrainer:
    arguments = SFTConfig(
        **common_arguments(task, folder),
        max_length=task.max_length,
        model_init_kwargs={"dtype": "bfloat16"},  # its own default doubles the weights
        **_CHANGES[way],
    )
    return watched(SFTTrainer, watch)(
        model=task.model,
        args=arguments,
        train_dataset=Dataset.from_list(read_rows(task.train)),
        eval_dataset=Dataset.from_list(read_rows(task.held_out)),
        peft_config=LoraConfig(
            r=task.lora_rank,
            lora_alpha=task.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


if __name__ == "__main__":
    main()

"""Fine-tune a model: `tunesmith train`, with the defaults below and `$HOME` as the home of its runs.

Every setting of `tunesmith train` is a flag (`--help` lists them), and may be a field of Config.
Flags win over the environment, the environment over a YAML file, the file over Config.
"""

import sys
from dataclasses import dataclass, field

import dataset_module
from dataset_module import HFDatasetConfig

from tunesmith.chart.scripts import run_fine_tune


@dataclass
class Config:
    hf_model_id: str = "Qwen/Qwen3-8B"
    model_path: str | None = None

    max_steps: int = 10000
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 4
    learning_rate: float = 5e-5
    min_learning_rate: float = 1e-6
    max_seq_length: int = 2048

    lora_rank: int = 32
    lora_alpha: float = 32
    lora_dropout: float = 0.1

    eval_steps: int = 100
    early_stopping_patience: int = 3
    use_wandb: bool = False

    hf_dataset_config: HFDatasetConfig = field(
        default_factory=lambda: HFDatasetConfig(
            dataset_name="cognitivecomputations/dolphin",
            dataset_config="flan1m-alpaca-uncensored",
            split="train",
            train_split_ratio=0.9,
            val_test_split_ratio=0.5,
            input_template="### Instruction:\n{instruction}\n ### Input:\n{input}\n",
            output_template="### Response:\n{output}",
            field_mapping={"instruction": "instruction", "input": "input", "output": "output"},
            num_proc=8,
        )
    )


if __name__ == "__main__":
    sys.exit(run_fine_tune(Config, getattr(dataset_module, "convert", None)))

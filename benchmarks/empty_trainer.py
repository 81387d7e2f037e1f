"""A TorchTrainer that trains nothing: what a start of Ray Train takes by itself. Writes `reached` when it's there."""

from __future__ import annotations

import sys
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def loop(config: dict[str, str]) -> None:
    from peft import LoraConfig, get_peft_model  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    Path(config["folder"], "reached").touch()


if __name__ == "__main__":
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir()
    ray.init("local")  # else it would join the cluster last started on this machine, dead or alive
    TorchTrainer(
        loop,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="empty", storage_path=str(folder)),
    ).fit()

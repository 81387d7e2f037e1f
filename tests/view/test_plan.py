"""What `plan` tells: memory as real training has it, changes that make a run fit, and the nodes of the examples."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from support.example_models import CONFIGS, INSTANCES, MODELS
from support.paths import REPOSITORY
from support.tiny_models import build_config, save_model
from support.tokenizers import build_tokenizer
from support.values import read_run
from tunesmith.cli import main
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Batch
from tunesmith.errors import ConfigError
from tunesmith.model.adapters.lora import add_adapters
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.dropout import drawing_from, make_column_keys
from tunesmith.model.kernels.install import CPU, install_kernels
from tunesmith.model.kernels.loss import sum_cross_entropy
from tunesmith.model.load import load_model_config
from tunesmith.parallel.replicate import replicate_model
from tunesmith.planning.dry_run import measure_microbatch, planned_kernels
from tunesmith.planning.fitting import find_fitting, make_plan
from tunesmith.planning.layout import plan_layout
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.shared_inputs import find_shared_inputs
from tunesmith.planning.workers import Workers, imagine_workers
from tunesmith.runs.metrics_log import iterate_metrics
from tunesmith.train.optimizer import build_optimizer

QUICKSTART = REPOSITORY / "examples" / "quickstart" / "build"
SMOLLM = QUICKSTART / "SmolLM2-135M-Instruct"
QUESTIONS = QUICKSTART / "python_questions.jsonl"
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
NUM_TOKENS, EXAMPLE_TOKENS = 128, 32


def build_real_model(family: str, config: TrainConfig, dtype: torch.dtype) -> Any:
    """Return the model on the CPU as `build_model` has it there."""
    model: Any = AutoModelForCausalLM.from_config(build_config(family, 300, **SHAPE))
    model.requires_grad_(config.full_ft)
    if not config.full_ft:
        model = add_adapters(model, config)
    planned = build_planned_model(config, build_config(family, 300, **SHAPE), dtype)
    install_kernels(model, CPU, find_shared_inputs(planned.model))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    replicate_model(model, torch.device("cpu"), dtype)
    (model if config.full_ft else model.get_base_model()).set_attn_implementation(VARLEN)
    return model.train()


def count_saved_bytes(model: Any, drops_by_token: bool) -> int:
    """Return the bytes that the model's forward keeps for its backward pass, up to the output layer."""
    starts = torch.arange(0, NUM_TOKENS + 1, EXAMPLE_TOKENS, dtype=torch.int32)
    ids_1T = torch.zeros(1, NUM_TOKENS, dtype=torch.int64)
    position_ids_1T = torch.arange(EXAMPLE_TOKENS).repeat(len(starts) - 1).unsqueeze(0)
    positions_N = torch.arange(NUM_TOKENS)
    batch = Batch(ids_1T, position_ids_1T, positions_N, ids_1T[0], starts, EXAMPLE_TOKENS)
    # Keys of columns are made once for all models.
    held = (*model.parameters(), *model.buffers(), make_column_keys(ids_1T.device))
    known = {tensor.untyped_storage()._cdata for tensor in held}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    counted: list[int] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda *_: counted.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
    )
    with (
        drawing_from(position_ids_1T if drops_by_token else None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        sum_cross_entropy(model, batch)
    handle.remove()
    return counted[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_planned_activations_are_those_that_a_real_forward_keeps(
    family: str, full_ft: bool, recompute: bool
) -> None:
    # Meta tensors of experts multiply in bfloat16 alone.
    dtype = torch.bfloat16 if family == "mixtral" or not full_ft else torch.float32
    config = TrainConfig(full_ft=full_ft, gradient_checkpointing=recompute, lora_rank=4)
    real = build_real_model(family, config, dtype)
    if full_ft:
        real.to(dtype)  # as FSDP has it while it computes
    planned = build_planned_model(config, build_config(family, 300, **SHAPE), dtype)
    hidden = NUM_TOKENS * SHAPE["hidden_size"] * dtype.itemsize
    for drops_by_token in (True, False):  # older runs keep masks
        microbatch = measure_microbatch(
            planned.model, NUM_TOKENS, EXAMPLE_TOKENS, planned_kernels("cpu"), drops_by_token
        )
        found = microbatch.recompute(SHAPE["num_hidden_layers"] if recompute else 0).activations
        saved = count_saved_bytes(real, drops_by_token)
        # Besides what is kept, the output layer's input and what the last norm computed it from are alive.
        assert saved <= found <= saved + 3 * hidden


@pytest.mark.parametrize("full_ft", [False, True])
def test_planned_weights_gradients_and_moments_have_the_real_ones_sizes(full_ft: bool) -> None:
    config = TrainConfig(full_ft=full_ft, lora_rank=4)
    real = build_real_model("qwen3", config, torch.bfloat16)
    optimizer = build_optimizer(real.parameters(), config)
    planned = build_planned_model(config, build_config("qwen3", 300, **SHAPE), torch.bfloat16)
    _, memory = plan_layout(planned, config, "cpu", 1, 1 << 34)
    trained = [p for p in real.parameters() if p.requires_grad]
    moments = [t for state in optimizer.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])]
    assert memory.weights + memory.adapters == sum(p.nbytes for p in real.parameters())
    assert memory.gradients == sum(p.nbytes for p in trained)
    assert memory.optimizer == sum(t.nbytes for t in moments)


def test_a_model_of_experts_needs_twice_as_much_in_float32() -> None:
    config = TrainConfig(lora_rank=4, fsdp="no_shard")
    shape = build_config("mixtral", 300, **SHAPE)
    half, full = (
        plan_layout(build_planned_model(config, shape, dtype), config, "cpu", 1, 1 << 34)[1]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert full.weights == 2 * half.weights
    assert full.activations == 2 * half.activations


def test_sharding_divides_what_lies_on_a_worker_by_their_number() -> None:
    config = TrainConfig(lora_rank=4, fsdp="full_shard")
    planned = build_planned_model(config, build_config("llama", 300, **SHAPE), torch.bfloat16)
    one, four = (plan_layout(planned, config, "cuda", n, 1 << 34)[1] for n in (1, 4))
    assert one.weights == 4 * four.weights
    assert one.optimizer == 4 * four.optimizer
    assert one.activations == four.activations


def make_tiny_plan(memory: int, num_workers: int = 1, **settings: Any) -> Any:
    config = TrainConfig(
        **{"lora_rank": 4, "max_seq_length": 512, "per_device_train_batch_size": 8, **settings}
    )
    planned = build_planned_model(config, build_config("llama", 300, **SHAPE), torch.bfloat16)
    workers = Workers(num_workers, "cuda", "test", memory, None, torch.bfloat16, imagined=True)
    return planned, make_plan(planned, config, workers)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"gradient_checkpointing": False}, {"gradient_checkpointing": None}),
        (
            {"gradient_checkpointing": True},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
        ),
        (
            {"per_device_train_batch_size": 1, "full_ft": False, "fsdp": "full_shard"},
            {"max_seq_length": 256},
        ),
    ],
)
def test_the_smallest_change_that_fits_is_told(settings: dict[str, Any], changed: dict[str, Any]) -> None:
    model, roomy = make_tiny_plan(1 << 40, **settings)
    # A byte less than needed: the first change that saves anything is enough.
    tight = replace(roomy, workers=replace(roomy.workers, memory=roomy.memory.total - 1, imagined=False))
    fitting = find_fitting(model, tight)
    assert fitting is not None
    assert fitting.fits
    assert not tight.fits
    for name, value in changed.items():
        assert getattr(fitting.config, name) == value


def test_more_workers_share_the_weights_and_the_global_batch() -> None:
    model, roomy = make_tiny_plan(1 << 40, per_device_train_batch_size=1, fsdp="full_shard")
    tight = replace(roomy, workers=replace(roomy.workers, memory=roomy.memory.total - 1))
    fitting = find_fitting(model, tight)
    assert fitting is not None
    assert (fitting.workers.num, fitting.config.gradient_accumulation_steps) == (2, 2)
    assert fitting.config.max_seq_length == roomy.config.max_seq_length


def test_what_nothing_makes_fit_is_said() -> None:
    model, planned = make_tiny_plan(1 << 20)
    assert find_fitting(model, planned) is None


def test_plan_prints_parts_speed_and_hours_and_ends_with_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(save_model(tmp_path / "tiny", build_tokenizer("byte_bpe")))
    assert main(["plan", "--model_path", tiny, "--gpu", "A100-80GB", "--num_workers", "8"]) == 0
    printed = capsys.readouterr().out
    assert "8 × A100-80GB" in printed
    assert "It fits." in printed
    assert re.search(r"[\d,]+ tokens/s", printed)
    large = ["--per_device_train_batch_size", "1024", "--max_seq_length", "65536", "--lora_rank", "4"]
    assert main(["plan", "--model_path", tiny, "--gpu", "L4", *large]) == 1
    assert "It fits with --per_device_train_batch_size" in capsys.readouterr().out


def plan_rows(folder: Path, *words: str) -> list[str]:
    """Return the words of a plan for a tiny model on two GPUs, which trains on seven rows in steps of four."""
    tiny = str(save_model(folder / "tiny", build_tokenizer("byte_bpe")))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{letter * 40}"}}\n' for letter in "abcdefg"))
    data = ["--dataset_name", str(rows), "--train_split_ratio", "1", "--max_seq_length", "64"]
    batch = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    return ["plan", "--model_path", tiny, "--gpu", "H100", "--num_workers", "2", *data, *batch, *words]


@pytest.mark.parametrize(("epochs", "steps"), [("1", 2), ("3", 6)])
def test_the_hours_of_epochs_are_those_of_the_rows(
    epochs: str, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer("byte_bpe")
    num_tokens = sum(len(tokenizer(letter * 40)["input_ids"]) + 1 for letter in "abcdefg")
    assert main(plan_rows(tmp_path, "--packing", "false", "--num_train_epochs", epochs)) == 0
    assert f"for {steps} steps of 4 rows, {epochs} × {num_tokens} tokens." in capsys.readouterr().out


def test_max_steps_end_a_planned_epoch_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--packing", "false", "--num_train_epochs", "1", "--max_steps", "1"]
    assert main(plan_rows(tmp_path, *words)) == 0
    assert re.search(r"for 1 step of 4 rows, 0\.5 × \d+ tokens\.", capsys.readouterr().out)


def test_rows_that_are_not_here_leave_the_speed_and_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent.jsonl")
    assert main(plan_rows(tmp_path, "--num_train_epochs", "1", "--dataset_name", absent)) == 0
    printed = capsys.readouterr().out
    assert "for 100 million tokens" in printed
    assert absent in printed


def test_a_run_on_this_machine_needs_its_rows_for_a_plan_of_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent.jsonl")
    tiny = str(save_model(tmp_path / "tiny", build_tokenizer("byte_bpe")))
    words = ["--model_path", tiny, "--use_gpu", "false", "--num_train_epochs", "1"]
    assert main(["plan", *words, "--dataset_name", absent]) == 2
    assert absent in capsys.readouterr().err


def test_a_file_of_the_charts_values_is_planned_as_the_run_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = save_model(tmp_path / "tiny", build_tokenizer("byte_bpe"))
    run = f"hf_model_id: {tiny}\nmodel_path: /fsx/elsewhere\nlora_rank: 4\nnum_workers: 8\nmax_steps: 7\n"
    (tmp_path / "run.yaml").write_text(run)
    indented = "".join(f"  {line}\n" for line in run.splitlines())
    (tmp_path / "values.yaml").write_text(f"resources: {{nnodes: 1}}\nrun:\n{indented}")
    printed = []
    for name in ("run.yaml", "values.yaml"):
        assert main(["plan", str(tmp_path / name), "--gpu", "H100"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "8 × H100" in printed[0]
    (tmp_path / "values.yaml").write_text("run: {lora_rnk: 4}")
    assert main(["plan", str(tmp_path / "values.yaml")]) == 2
    assert "values.yaml: run`: unknown setting `lora_rnk`" in capsys.readouterr().err


def test_workers_that_this_machine_lacks_are_planned_on_named_gpus(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--num_workers", "4096"]) == 2
    assert "--gpu A100-80GB" in capsys.readouterr().err


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError) as caught:
        imagine_workers(TrainConfig(), "A1000")
    assert "A100" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("gpu", "gib"),
    # What torch names as their total capacity when they run out of memory.
    [
        ("B200", 178.4),
        ("H200", 139.8),
        ("H100", 79.2),
        ("A100", 39.4),
        ("A100-80GB", 79.2),
        ("V100", 15.8),
        ("L40S", 44.4),
        ("L4", 22.0),
        ("A10G-24GB", 22.1),
        ("h100-80gb", 79.2),
    ],
)
def test_an_imagined_gpu_has_the_memory_that_a_real_one_reports(gpu: str, gib: float) -> None:
    assert imagine_workers(TrainConfig(), gpu).memory == pytest.approx(gib * 2**30, rel=0.01)


def plan_example(name: str, folder: Path) -> Any:
    """Return the plan of a sized example on the GPUs that it asks for."""
    config = read_run(MODELS[name], folder)
    instance = INSTANCES[MODELS[name]["resources"]["node_type"]]
    workers = imagine_workers(config, f"{instance.gpu}-{instance.gpu_gb}GB")
    return make_plan(build_planned_model(config, CONFIGS[config.hf_model_id], workers.dtype), config, workers)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_sized_example_fits_as_planned_and_the_page_says_what_it_takes(
    name: str, tmp_path: Path
) -> None:
    planned = plan_example(name, tmp_path)
    assert planned.fits
    row = re.search(
        rf"^.*\(\.\./examples/{re.escape(name)}\).*$", (REPOSITORY / "docs/eks.md").read_text(), re.MULTILINE
    )
    assert row is None or row[0].endswith(f"| {planned.memory.total / 1e9:.1f} GB |")


def test_the_page_plans_every_node_of_its_table() -> None:
    rows = re.findall(
        r"^\| .*\.\./examples/models/.*$", (REPOSITORY / "docs/eks.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 5
    assert all(re.search(r"\| [\d.]+ GB \|$", row) for row in rows)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(
    not (SMOLLM.is_dir() and QUESTIONS.is_file()),
    reason="needs the quickstart's model and rows: make model questions",
)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_planned_peak_is_that_of_a_real_training_on_cpus(recompute: bool, tmp_path: Path) -> None:
    words = ["--model_path", str(SMOLLM), "--dataset_name", str(QUESTIONS)]
    words += ["--home", str(tmp_path), "--gradient_checkpointing", str(recompute), "--max_steps", "2"]
    words += ["--train_split_ratio", "1.0", "--logging_steps", "1", "--gradient_accumulation_steps", "1"]
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "train",
        str(REPOSITORY / "examples/quickstart/run.yaml"),
        *words,
    ]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    settings = {"max_seq_length": 512, "lora_rank": 16, "gradient_checkpointing": recompute}
    config = TrainConfig(model_path=SMOLLM, home=tmp_path, **settings)
    measured = max(
        line["peak_memory_bytes"]
        for line in iterate_metrics(next(tmp_path.rglob("metrics.jsonl")))
        if "peak_memory_bytes" in line
    )
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    planned = build_planned_model(config, load_model_config(config.model), dtype)
    _, memory = plan_layout(planned, config, "cpu", 1, 1 << 34)
    # Where the weights are cast, the process's peak has the pages of their file too, which the system takes back;
    # the heap beside them has differed by a quarter between such machines.
    cast = dtype != torch.bfloat16
    planned_bytes = memory.total + cast * (SMOLLM / "model.safetensors").stat().st_size
    print(f"planned {planned_bytes / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB in {dtype}")
    assert abs(planned_bytes / measured - 1) < (0.3 if cast else 0.15)

"""`tunesmith plan`: what a run needs and how long it takes, printed before it starts."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import TYPE_CHECKING

from tunesmith.config import TrainConfig
from tunesmith.data.batches import BatchPlan, GlobalBatch, Sequences
from tunesmith.data.epochs import plan_epochs
from tunesmith.data.shares import measure_shares
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model.adapters.new_tokens import load_run_tokenizer
from tunesmith.model.adapters.prior import with_prior_settings
from tunesmith.model.attention_choice import check_attention
from tunesmith.model.files.fetched import with_model_here
from tunesmith.model.files.tokenizer_files import holds_tokenizer
from tunesmith.model.load import build_meta_model, load_model_config
from tunesmith.model.positions import check_length
from tunesmith.model.vocabulary import check_data_tokens, count_known_tokens
from tunesmith.parallel.activation_checkpointing import describe_recomputation
from tunesmith.paths import expand_user, is_dir
from tunesmith.planning.fitting import Plan, find_fitting, make_plan
from tunesmith.planning.host import estimate_host
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.throughput import count_flops_per_token
from tunesmith.planning.workers import Workers
from tunesmith.remote.copies import copies_in
from tunesmith.view.inspect import prepared_to_look_at
from tunesmith.view.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

# The share of what its products could do that a training reaches. CPU: about what a 135M model did with LoRA.
# GPU: assumed, what the best published LoRA runs reach of an H100's data sheet.
_SHARE_OF_PEAK = {"cpu": 0.4, "cuda": 0.4}


def plan(config: TrainConfig, workers: Workers) -> bool:
    """Print, to stdout, what the run needs on these workers, and how long it takes; return whether it fits.

    The data set is looked at only where `num_train_epochs` makes the hours depend on it.

    Raises:
        ModelError, ConfigError, DataError: as `train` has them; for imagined workers, data may be absent.
    """
    from rich.console import Console

    console = Console(highlight=False)
    with copies_in(config.home):
        return _plan(config, workers, console)


def _plan(config: TrainConfig, workers: Workers, console: Console) -> bool:
    config = with_prior_settings(_with_model_at_hand(config, workers.imagined))
    _check_model(config)
    model_config = load_model_config(config.model)
    model = build_planned_model(config, model_config, workers.dtype)
    num_known = count_known_tokens(model.model)
    check_attention(config.attn_implementation, model.model, str(config.model.source))
    planned = make_plan(model, config, workers)
    _print_memory(console, planned)
    if workers.device_type == "cuda":
        needed = estimate_host(model, model_config, config, planned.layout, workers.num)
        console.print(f"Each worker needs {format_bytes(needed)} of its node's memory.", soft_wrap=True)
    _print_time(console, planned, count_flops_per_token(model.model, config.full_ft), num_known)
    if not planned.fits:
        console.print(_describe_change(planned, find_fitting(model, planned)), soft_wrap=True)
    return planned.fits


def _check_model(config: TrainConfig) -> None:
    """Check what a training would refuse before it starts, without the weights."""
    model_config = load_model_config(config.model)
    if config.model.folder is not None and holds_tokenizer(config.model.folder):
        load_run_tokenizer(config)
    model = build_meta_model(config.model, model_config)
    check_length(model, config.max_seq_length, "max_seq_length", str(config.model.source))


def _with_model_at_hand(config: TrainConfig, imagined: bool) -> TrainConfig:
    """Return the settings with the model on this machine; for imagined workers, with the hub's where it isn't here."""
    missing = "is not here"
    try:
        config = with_model_here(config, weights=False)
    except ModelError as error:
        missing = f"can't be had here ({error.message})"
        if not imagined or "hf_model_id" not in config.model_fields_set:
            raise
    at_hand = config.model_path is None or is_dir(expand_user(config.model_path))
    if not imagined or at_hand or "hf_model_id" not in config.model_fields_set:
        return config
    logger.info("`%s` %s; planned for `%s` instead", config.model_path, missing, config.hf_model_id)
    return config.model_copy(update={"model_path": None})


def _describe_change(planned: Plan, fitting: Plan | None) -> str:
    if fitting is None:
        return "No change of settings makes it fit: take a smaller model, or workers with more memory."
    before, after = planned.config, fitting.config
    changed = [name for name in TrainConfig.model_fields if getattr(before, name) != getattr(after, name)]
    flags = [f"--{name} {_spell(getattr(after, name))}" for name in changed]
    if fitting.workers.num != planned.workers.num:
        flags.append(f"--num_workers {fitting.workers.num}")
    return f"It fits with {' '.join(flags)}: {format_bytes(fitting.memory.total)} a worker."


def _spell(value: object) -> str:
    return "auto" if value is None else str(value).removesuffix(".0")


def _print_memory(console: Console, planned: Plan) -> None:
    from rich import box
    from rich.table import Table

    workers, layout = planned.workers, planned.layout
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("per worker")
    table.add_column("memory", justify="right")
    for part in fields(planned.memory):
        table.add_row(part.name, format_bytes(getattr(planned.memory, part.name)))
    table.add_section()
    table.add_row("together", format_bytes(planned.memory.total))
    table.add_row(f"{workers.name} has", format_bytes(workers.memory))
    placed = "sharded" if layout.num_replicas == 1 else f"sharded within each of {layout.num_replicas} nodes"
    if not layout.reshard_after_forward:
        placed += ", gathered once a step"
    recomputed = describe_recomputation(layout.num_recomputed, layout.num_blocks)
    console.print(
        f"{planned.config.model.source}: {workers.num} × {workers.name}, "
        f"{str(workers.dtype).removeprefix('torch.')}, "
        f"weights {'whole on each worker' if layout.replicated else placed}, gradient checkpointing {recomputed}",
        soft_wrap=True,
    )
    console.print(table)
    console.print("It fits." if planned.fits else "[bold red]It doesn't fit.[/]")


def _print_time(console: Console, planned: Plan, flops_per_token: float, num_known: int) -> None:
    config, workers = planned.config, planned.workers
    if workers.flops is None:
        console.print(f"How fast a {workers.name} computes isn't known here.")
        return
    share = _SHARE_OF_PEAK[workers.device_type]
    speed = workers.num * workers.flops * share / flops_per_token
    console.print(
        f"About {speed:,.0f} tokens/s, if {share:.0%} of the products' speed is reached: "
        f"{_describe_hours(config, workers, speed, num_known)}",
        soft_wrap=True,
    )


def _describe_hours(config: TrainConfig, workers: Workers, speed: float, num_known: int) -> str:
    rows = config.gradient_accumulation_steps * workers.num * config.per_device_train_batch_size
    if config.num_train_epochs is None:
        seconds = config.max_steps * rows * config.max_seq_length / speed
        return f"{format_duration(seconds)} for {_count_steps(config.max_steps)} of {rows} full rows."
    try:
        steps, epochs, num_tokens = _count_steps_of(config, rows, num_known)
    except TunesmithError as error:
        if not workers.imagined:
            raise
        return (
            f"{format_duration(1e8 / speed)} for 100 million tokens. "
            f"How many an epoch has can't be told here: {error.message}."
        )
    return (
        f"{format_duration(epochs * num_tokens / speed)} for {_count_steps(steps)} of {rows} rows, "
        f"{epochs:.3g} × {num_tokens:,} tokens."
    )


def _count_steps(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps:,} steps"


def _count_steps_of(config: TrainConfig, rows: int, num_known: int) -> tuple[int, float, int]:
    """Return the run's steps of so many rows, its epochs and an epoch's tokens; prepares the data set for that.

    `num_known` are the tokens that the model knows.
    """
    tokenizer = load_run_tokenizer(config)
    with prepared_to_look_at(config, tokenizer) as prepared:
        sets = (prepared.train, prepared.validation)
        check_data_tokens(sets, tokenizer, num_known, str(config.model.source))
        epochs = plan_epochs(prepared.train, config, config.packing)
        sequences = Sequences(prepared.train, config.packing, pad_token_id=0, epochs=epochs)
        plan = BatchPlan(len(sequences), GlobalBatch(1, rows), config.seed, epochs)
        steps = plan.total_steps(config.max_steps, config.num_train_epochs)
        num_tokens = sum(share.tokens for share in measure_shares(prepared.train, config.data_sets))
        return steps, plan.epoch(steps), num_tokens

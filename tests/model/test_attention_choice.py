"""The attention that is chosen computes all that the model asks of it, and what doesn't is told."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    MptConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)

from support.families import WINDOWED, family_config, family_model
from support.runs import losses, small_config, start, train_here
from support.tiny_models import FAMILIES, build_config
from support.tokenizers import build_tokenizer
from support.workers import WorkerGroup
from tunesmith.compat import attention_name, eager_attention
from tunesmith.config import ModelRef, TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.evaluate.engines.base import EngineSpec
from tunesmith.evaluate.engines.transformers import TransformersEngine
from tunesmith.model import attention_choice
from tunesmith.model.attention_choice import choose_attention, name_left_out
from tunesmith.model.load import attention_of
from tunesmith.model.probe import attends_rightly
from tunesmith.parallel.mesh import build_mesh
from tunesmith.planning.attention import find_attention, own_attention
from tunesmith.planning.memory import build_planned_model
from tunesmith.train.build import build_model, choose_ways
from tunesmith.train.choices import keep_recorded
from tunesmith.train.start import check_model

pytestmark = [pytest.mark.usefixtures("alone")]

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (Gemma2Config(), {"sdpa": "attn_logit_softcapping"}),
        (Gemma2Config(attn_logit_softcapping=None), {}),
        (Gemma3TextConfig(), {}),
        (Gemma3TextConfig(attn_logit_softcapping=30.0), {"sdpa": "attn_logit_softcapping"}),
        (PretrainedConfig(attention_logit_cap=20.0), {"sdpa": "attention_logit_cap"}),
        (PretrainedConfig(moe_router_attention_logit_cap=20.0, final_logit_softcapping=30.0), {}),
        (PretrainedConfig(attention_sinks=True), {"sdpa": "sinks", "flash_attention_2": "sinks"}),
        (PretrainedConfig(hc_sinkhorn_iters=20), {}),
        (FalconConfig(), {}),
        (FalconConfig(alibi=True), {"flash_attention_2": "alibi"}),
        (MptConfig(), {"flash_attention_2": "alibi"}),
        (build_config("mistral", 300), {}),
    ],
    ids=str,
)
def test_a_configuration_s_own_fields_tell_what_a_backend_leaves_out(
    config: PretrainedConfig, left_out: dict[str, str]
) -> None:
    for backend in ("sdpa", "flash_attention_2", "eager", "flex_attention"):
        words = name_left_out(backend, config)
        assert len(words) == (backend in left_out)
        assert left_out.get(backend, "") in "".join(words)
    chosen = choose_attention(config, "cpu", False, "auto", lambda: True)
    assert chosen == ("eager" if "sdpa" in left_out else None)
    for asked in ("sdpa", "eager", "flex_attention"):
        assert choose_attention(config, "cuda", True, asked, lambda: True) == asked


def usual(family: str, dtype: torch.dtype, **changes: Any) -> Any:
    """Return a model with the weights that it begins with, whose scores are far below any cap."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family_config(family, **changes)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes", "is_right"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, False),
        ("gemma2", {"attn_logit_softcapping": 2000.0}, False),
        ("gemma2", {"attn_logit_softcapping": None}, True),
        ("gpt_oss", {}, False),
        ("gemma3", {}, True),
        ("llama4", {}, True),
        ("gpt2", {}, True),
    ],
    ids=str,
)
def test_the_probe_shows_what_sdpa_leaves_out_however_small_the_scores_are(
    family: str, changes: dict[str, Any], is_right: bool, dtype: torch.dtype
) -> None:
    model = usual(family, dtype, **changes)
    # As if nothing had told it.
    model._supports_sdpa = True
    model.config._attn_implementation_internal = "sdpa"
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    assert attends_rightly(model, CPU) == is_right
    assert attention_of(model) == "sdpa"
    assert [getattr(module, "sliding_window", None) for module in model.modules()] == windows
    assert model.training


def test_the_probe_shows_a_window_that_a_backend_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = usual("gemma3", torch.bfloat16)
    assert attends_rightly(model, CPU)
    sdpa = AttentionInterface()["sdpa"]

    def attend_far(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        return sdpa(module, query, key, value, None, **options)

    AttentionInterface.register("far", attend_far)
    model.set_attn_implementation("far")
    assert not attends_rightly(model, CPU)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gpt2"])
def test_a_layer_s_own_attention_is_found(family: str) -> None:
    model = usual(family, torch.float32)
    (layer, *_) = (m for m in model.modules() if type(m).__name__.endswith("Attention"))
    assert callable(eager_attention(layer))
    assert eager_attention(torch.nn.Linear(1, 1)) is None


@pytest.fixture
def capped(tmp_path: Path) -> Path:
    """A Gemma 2 whose cap on attention scores is felt."""
    family_model("gemma2", vocab_size=len(build_tokenizer("byte_bpe"))).save_pretrained(tmp_path / "capped")
    build_tokenizer("byte_bpe").save_pretrained(tmp_path / "capped")
    return tmp_path / "capped"


def test_a_cap_is_kept_in_training_and_evaluation(capped: Path, rows: Path, tmp_path: Path) -> None:
    config = small_config(capped, rows, tmp_path, max_seq_length=40)
    assert attention_of(build_model(config, CPU, build_mesh(0, 1))) == "eager"
    engine = TransformersEngine(spec_of(capped))
    assert attention_name(engine._model) == "eager"


def test_what_no_field_tells_is_found_by_trying(
    capped: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_choice, "_CAP", re.compile("a name that nothing has"))
    config = small_config(capped, rows, tmp_path, max_seq_length=40)
    model = build_model(config, CPU, build_mesh(0, 1))
    assert attention_of(model) == "sdpa"
    choose_ways(config, model, CPU)
    assert attention_of(model) == "eager"
    assert attention_name(TransformersEngine(spec_of(capped))._model) == "eager"


def test_a_backend_that_is_named_is_kept_with_a_warning_of_what_it_leaves_out(
    capped: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(capped, rows, tmp_path, attn_implementation="sdpa")
    with caplog.at_level(logging.WARNING, "tunesmith"):
        check_model(config)
    assert (
        "attention `sdpa` leaves out a cap on attention scores (`attn_logit_softcapping` is 2.0)"
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tunesmith"):
        check_model(config.model_copy(update={"attn_implementation": "auto"}))
        check_model(config.model_copy(update={"attn_implementation": "eager"}))
    assert caplog.text == ""


@pytest.mark.parametrize("family", ["gpt_oss", "bloom"])
def test_sdpa_is_refused_by_name_before_a_run_where_a_model_has_none(
    family: str, rows: Path, tmp_path: Path
) -> None:
    family_model(family).save_pretrained(tmp_path / "model")
    config = small_config(tmp_path / "model", rows, tmp_path, attn_implementation="sdpa")
    with pytest.raises(
        ConfigError, match=r"`attn_implementation` is `sdpa`, which .* can't attend with"
    ) as error:
        check_model(config)
    assert "leave `attn_implementation` out" in str(error.value.hint)
    check_model(config.model_copy(update={"attn_implementation": "eager"}))


def test_a_run_that_was_begun_without_its_cap_goes_on_so_and_says_so(
    capped: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def config(home: str, **changes: Any) -> Any:
        return small_config(capped, rows, tmp_path / home, lr_scheduler_type="constant", **changes)

    whole = train_here(start(config("whole", attn_implementation="sdpa")))
    run = train_here(start(config("halved", attn_implementation="sdpa", max_steps=2)))
    # As a run of before recorded it: nobody named a backend.
    params = run.read_params()
    params["settings"]["attn_implementation"] = "auto"
    run.write_params(params)
    with caplog.at_level(logging.WARNING, "tunesmith"):
        run = train_here(start(config("halved")))
    assert run.read_params()["resolved"]["attn_implementation"] == "sdpa"
    assert "attention `sdpa` leaves out a cap" in caplog.text
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_run_whose_windows_were_masked_goes_on_so(attention: str) -> None:
    config, mesh = TrainConfig(), build_mesh(0, 1)
    recorded = {
        "dtype": "float32",
        "attn_implementation": attention,
        "fsdp": "no_shard",
        "num_workers": 1,
        "use_gpu": False,
    }
    assert keep_recorded(config, recorded, mesh, use_gpu=False).attn_implementation == attention
    assert keep_recorded(config, recorded, mesh, use_gpu=True).attn_implementation == "auto"
    recorded["attn_implementation"] = "varlen"
    assert keep_recorded(config, recorded, mesh, use_gpu=False).attn_implementation == "auto"


def test_windows_that_a_model_only_masks_are_left_to_the_mask_with_a_warning(
    rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_config = Qwen2MoeConfig(
        **WINDOWED, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4
    )
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path / "model")
    for length, attention in ((8, "varlen"), (9, "sdpa")):
        config = small_config(tmp_path / "model", rows, tmp_path, max_seq_length=length)
        model = build_model(config, CPU, build_mesh(0, 1))
        with caplog.at_level(logging.WARNING, "tunesmith"):
            choose_ways(config, model, CPU)
        assert attention_of(model) == attention
        planned = build_planned_model(config, model_config, torch.float32)
        own = own_attention(planned.model, planned.built_with, config, "cpu", torch.float32)
        assert find_attention(planned.model, own, config, "cpu", torch.float32) == attention
    assert caplog.text.count("attention `varlen` gives way to `sdpa`") == 1
    assert "a layer attends otherwise" in caplog.text


@pytest.mark.slow
def test_sharded_workers_find_and_choose_alike(
    capped: Path, rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    config = small_config(capped, rows, tmp_path, fsdp="full_shard")
    assert two_workers.run(choose_on_rank, config) == [("sdpa", "eager")] * 2


def choose_on_rank(rank: int, world_size: int, config: Any) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_choice, "_CAP", re.compile("a name that nothing has"))
        model = build_model(config, CPU, build_mesh(rank, world_size))
        own = attention_of(model)
        choose_ways(config, model, CPU)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return own, attention_of(model)


def spec_of(model: Path) -> EngineSpec:
    return EngineSpec(
        ModelRef(model), None, "float32", max_model_len=64, max_tokens=8, temperature=0, top_k=0, top_p=1,
        stop_token_ids=(0,), seed=0, batch_size=2,
    )  # fmt: skip

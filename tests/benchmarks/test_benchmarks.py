"""What the benchmarks count, compare and write; not how fast anything is."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.paths import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
sys.path.append(str(REPOSITORY / "benchmarks" / "peers"))

import ours as our_turn
import page
import training
from flops import Shape, count_flops, measure_shape
from turn import Figures, Task, run_process, run_turn
from watch import count_batch

from tunesmith.compat import has_bfloat16_instructions

BENCHMARKS = REPOSITORY / "benchmarks"
TASK = Task(
    model="model",
    train="train.jsonl",
    held_out="held_out.jsonl",
    batch_size=2,
    max_length=64,
    lora_rank=4,
    lora_alpha=8,
    learning_rate=1e-3,
    num_steps=3,
    num_examples=4,
    num_threads=1,
)


def figures_of(step_s: float, **changes: Any) -> Figures:
    """Return a turn whose first step took ten times as long as the two others."""
    figures = Figures(
        start_s=5.0,
        step_s=[10 * step_s, step_s, step_s],
        tokens=[100, 100, 100],
        trained_tokens=[60, 60, 60],
        examples=[4, 4, 4],
        losses=[2.0, 1.9, 1.8],
        held_out_trained_tokens=50,
        loss_before=2.0,
        loss_after=1.8,
        peak_bytes=2**30,
    )
    return replace(figures, **changes)


def results_of_all_parts() -> dict[str, Any]:
    own = {"flops": [1e9] * 3, "product_flops_per_s": [4e9] * 3, "planned_bytes": 2**30 + 2**27}
    ours = [figures_of(seconds, **own) for seconds in (0.5, 1.0)]
    turns = {name: [figures_of(2.0), figures_of(3.0)] for name in training.WAYS} | {"tunesmith": ours}
    return {
        "machine": {"processor": "a CPU", "cpus": 2, "python": "3.11", "versions": {"torch": "2"}},
        "training": {
            "task": asdict(TASK),
            "turns": {name: [asdict(one) for one in figures] for name, figures in turns.items()},
        },
        "levers": {
            "turns": {
                name: [asdict(figures_of(seconds))] for name, seconds in (("default", 1.0), ("a lever", 2.0))
            }
        },
        "start-up": {"tunesmith": [9.0, 11.0], "empty": [7.0, 9.0]},
        "checkpoints": {"step_s": [1.0, 2.0], "saved_step_s": [1.5, 2.5]},
        "tokens": {"tokens_per_s": {"tokenize and pack": [3.0], "datasets.map": [2.0]}, "full": 0.99},
        "conversations": {"tokens_per_s": {"tokenize and pack": [3.0], "datasets.map": [2.5]}, "full": 0.99},
        "workers": {"1": [100.0], "2": [190.0]},
        "large-data": [
            {
                "rows": 10,
                "file_bytes": 2**20,
                "seconds": 1.0,
                "imports_bytes": 2**20,
                "peak_bytes": 2**21,
                "child_peak_bytes": 0,
            }
        ],
    }


GPU_RESULTS = {
    "device": "a GPU",
    "versions": {"torch": "2"},
    "asked": {"shape": "tiny", "rows": 2, "max_length": 64, "accumulation": 2},
    "parts": {"lora": {"rows of one example": {"tokens_per_s": [10.0], "mfu": 0.5, "peak_bytes": 2**30}}},
}


def test_levers_replace_what_there_is() -> None:
    for _, patches in our_turn.LEVERS.values():
        assert all(hasattr(module, name) for module, name, _ in patches)


def test_the_counted_work_is_what_a_model_computes(model_of: Callable[[str], Path]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    num_tokens = 24
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"), attn_implementation="eager")
    model.enable_input_require_grads()  # else the first block is spared a gradient that the others need
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids_1T = torch.arange(num_tokens).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_1T, use_cache=False).logits.sum().backward()
    shape = measure_shape(model)
    # The counter knows of no mask: it counts the half of the attention that is masked, too.
    masked = 3 * shape.num_layers * 4 * num_tokens**2 * shape.attention_width / 2
    assert count_flops(shape, [num_tokens], num_tokens) == counter.get_total_flops() - masked


def test_tokens_that_are_not_trained_cost_no_head_and_examples_no_attention_to_each_other() -> None:
    shape = Shape(frozen=1000, adapters=10, head=500, num_layers=2, attention_width=8)
    assert count_flops(shape, [10], 10) - count_flops(shape, [10], 4) == 6 * 4 * 500
    apart, together = count_flops(shape, [10, 10], 5), count_flops(shape, [20], 5)
    assert together - apart == 3 * 2 * 4 * 8 / 2 * (20**2 - 2 * 10**2)


def test_a_batch_is_counted_without_padding_whether_padded_or_flattened() -> None:
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, 8, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    padded = {"input_ids": torch.ones(2, 4), "labels": labels, "attention_mask": mask}
    flat = {
        "input_ids": torch.ones(1, 7),
        "labels": torch.tensor([[-100, 5, 6, 7, -100, -100, 8]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
    }
    assert count_batch(padded) == count_batch(flat) == (2, 7, 4)


def test_a_turns_speed_leaves_its_first_step_out() -> None:
    assert page.speed(figures_of(0.5)) == 200.0


def test_a_ratio_is_taken_within_each_turn() -> None:
    turns = {
        "ours": [figures_of(seconds) for seconds in (1.0, 10.0, 1.0)],
        "theirs": [figures_of(seconds) for seconds in (2.0, 20.0, 8.0)],
    }
    assert page.compare(turns, page.speed, "ours", "theirs") == 2.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"loss_before": 2.03}, "loss before"),
        ({"loss_after": 1.6}, "loss after"),
        ({"held_out_trained_tokens": 51}, "trained tokens"),
        ({"loss_after": None}, "--steps"),
        ({"loss_before": 1.99, "loss_after": 1.99}, "loss after"),
    ],
)
def test_ways_that_train_something_else_are_refused(changes: dict[str, Any], complaint: str) -> None:
    agreeing = {"tunesmith": figures_of(1.0), "TRL": figures_of(1.0, loss_before=2.01, loss_after=1.75)}
    training.check_losses(agreeing)
    with pytest.raises(SystemExit, match=complaint):
        training.check_losses({**agreeing, "TRL": figures_of(1.0, **changes)})


def test_a_way_that_learns_nothing_is_refused() -> None:
    with pytest.raises(SystemExit, match="learns nothing"):
        training.check_losses({"tunesmith": figures_of(1.0, loss_after=2.0)})


def test_every_section_of_the_page_is_filled_and_its_words_stay(tmp_path: Path) -> None:
    copy = tmp_path / "performance.md"
    copy.write_text(page.PAGE.read_text())
    (tmp_path / "cpu.json").write_text(json.dumps(results_of_all_parts()))
    (tmp_path / "gpu.json").write_text(json.dumps(GPU_RESULTS))
    shutil.copy(page.RESULTS / "roofline.json", tmp_path)
    page.write(tmp_path, copy)
    filled = copy.read_text()
    assert "Not measured yet." not in filled
    assert words_of(filled) == words_of(page.PAGE.read_text())
    for table in re.findall(r"(?:^\|.*\n)+", filled, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert "| tunesmith | 150 (100–200) | 3.50 | 38% |" in filled
    page.write(tmp_path, copy)
    assert copy.read_text() == filled


def words_of(text: str) -> str:
    """Return the page without what the programs fill in."""
    return re.sub(r"(<!-- (\S+) -->).*?(<!-- end of \2 -->)", r"\1\3", text, flags=re.DOTALL)


def test_a_section_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="no markers <!-- gpu -->"):
        page.fill("# Performance\n", "gpu", "fast")


def test_each_goal_says_whether_it_is_met() -> None:
    verdicts = {row.split(" | ")[0]: row for row in page.tabulate_goals(results_of_all_parts()).splitlines()}
    assert verdicts["| training, tokens/s beside TRL's default"].endswith("| 3.50 × | ≥ 3.00 × | met |")
    assert verdicts["| share of the matrix-product limit"].endswith("| 38% | ≥ 55% | **missed** |")
    assert verdicts["| start beside an empty TorchTrainer's"].endswith("| +2.0 s | ≤ +3.0 s | met |")
    assert verdicts["| checkpoint every 50 steps"].endswith("| 0.7% | ≤ 2.0% | met |")
    assert verdicts["| two workers, of twice one's tokens/s"].endswith("| 95% | ≥ 90% | met |")


def test_one_cpu_has_no_verdict_on_two_workers() -> None:
    results = results_of_all_parts() | {"workers": {"1": [], "2": []}}
    assert "| needs two CPUs | ≥ 90% |  |" in page.tabulate_goals(results)


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    turns = page.read_turns(results_of_all_parts())
    page.draw(turns, tmp_path / "first.svg")
    page.draw(turns, tmp_path / "second.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert b"TRL, packed" in (tmp_path / "first.svg").read_bytes()


def test_a_part_that_runs_again_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.json"
    training.record(path, {"training": 1, "tokens": 1})
    training.record(path, {"tokens": 2})
    assert json.loads(path.read_text()) == {"training": 1, "tokens": 2}


def test_held_out_rows_are_not_trained_and_keep_their_text(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}?", "answer": f"a{i}"}) + "\n" for i in range(20)))
    train, held_out = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in training.write_task_rows(data, tmp_path)
    )
    assert [len(train), len(held_out)] == [4, 16]
    assert held_out[0] == {"prompt": "### Question:\nq0?\n### Answer:\n", "completion": "a0"}
    assert train[0]["completion"] == "a16"
    data.write_text('{"text": "no questions"}\n' * 20)
    with pytest.raises(SystemExit, match="`question` and `answer`"):
        training.write_task_rows(data, tmp_path)


def test_a_part_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py", "--only", "training", "speed"])
    with pytest.raises(SystemExit):
        training.main()
    assert "invalid choice: 'speed' (choose from 'training', 'levers'" in capsys.readouterr().err


def test_a_script_that_fails_ends_the_benchmark_with_its_words() -> None:
    with pytest.raises(SystemExit, match=r"(?s)absent\.py.*No such file"):
        run_process(Path(sys.executable), "absent.py")


def test_the_peers_share_our_pinned_versions() -> None:
    def names_in(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        return {line.partition("==")[0].lower(): line.partition("==")[2] for line in lines}

    pinned = names_in(REPOSITORY / "constraints.txt")
    for name, version in names_in(BENCHMARKS / "requirements-peers.txt").items():
        assert version or pinned[name], name


@pytest.mark.slow
def test_a_turn_of_ours_measures_what_the_others_are_compared_by(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"{i} and {i}?", "answer": f"It is {2 * i}."} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = training.write_task_rows(data, tmp_path)
    task = replace(
        TASK, model=str(model_of("llama")), train=str(train), held_out=str(held_out), learning_rate=1e-2
    )
    figures = run_turn(Path(sys.executable), "ours.py", "default", task)
    assert [len(values) for values in (figures.step_s, figures.tokens, figures.losses, figures.flops)] == [
        3
    ] * 4
    assert figures.loss_after is not None
    training.check_losses({"tunesmith": figures})
    share = page.share_of_limit(figures)
    assert share > 0
    # Without instructions for bfloat16 its products are no limit.
    assert share < 1 or not has_bfloat16_instructions()

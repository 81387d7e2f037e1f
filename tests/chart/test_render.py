"""`tunesmith render`: what Helm makes of the chart and a run config, and what is refused before Helm has a say."""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.helm import (
    CHART,
    Values,
    container_of,
    dump_json,
    helm,
    pods_of,
    rayjob_of,
    read_manifests,
    run_helm,
)
from support.paths import REPOSITORY
from support.values import GPUS
from tunesmith import cli, verbs
from tunesmith.chart.package import package_zip
from tunesmith.chart.release import Release, choose_name, render
from tunesmith.config import TrainConfig
from tunesmith.config.flags import find_field
from tunesmith.config.layers import load_settings
from tunesmith.config.yaml_file import write_yaml
from tunesmith.verbs import VERBS

CLUSTER: Values = {
    "image": "registry.example/tunesmith:1",
    "resources": {"nnodes": 2, "requests": GPUS, "limits": GPUS},
    "pre_script": ["export A='x: {{ y }}'"],
}
SETTINGS: dict[str, Any] = {
    "hf_model_id": "Qwen/Qwen3-8B",
    "dataset_name": "/fsx/rows.jsonl",
    "learning_rate": 1e-5,
}

Ended = tuple[int, str, str]
Tunesmith = Callable[..., Ended]


@pytest.fixture
def tunesmith(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Tunesmith:
    """`tunesmith(*words)` runs the command in a folder with run.yaml and cluster.yaml: exit code, stdout, stderr."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "helm").symlink_to(helm())
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(write_yaml(SETTINGS))
    Path("cluster.yaml").write_text(dump_json(CLUSTER))

    def run(*words: str) -> Ended:
        exit_code = cli.main(words)
        return exit_code, *capsys.readouterr()

    return run


def template_by_hand(values: Values, *words: str) -> str:
    done = run_helm("template", "my-run", str(CHART), "-f", "-", *words, values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_render_prints_what_helm_makes_of_the_same_values(tunesmith: Tunesmith) -> None:
    words = ["--namespace", "team", "--set", "ray.version=2.60.1"]
    exit_code, out, _ = tunesmith(
        "render", "run.yaml", "-f", "cluster.yaml", "--lora_rank=8", "--release", "my-run", *words
    )
    assert exit_code == 0
    assert out == template_by_hand({**CLUSTER, "run": {**SETTINGS, "lora_rank": 8}}, *words)


def test_later_values_win_as_in_helm(tunesmith: Tunesmith, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("image: other\npvc:\n- {name: shared, mount_path: /fsx}\n")
    _, out, _ = tunesmith(
        "render", "run.yaml", "--values=cluster.yaml", "-f", "more.yaml", "--release=my-run"
    )
    more = {"image": "other", "pvc": [{"name": "shared", "mount_path": "/fsx"}]}
    assert out == template_by_hand({**CLUSTER, **more, "run": SETTINGS})


def read_rendered(text: str, folder: Path) -> TrainConfig:
    """Return the config that the pods would load."""
    files = next(m["data"] for m in read_manifests(text) if m["metadata"]["name"].endswith("-job"))
    path = folder / "rendered.yaml"
    path.write_text(files["run.yaml"], encoding="utf-8")
    return load_settings(TrainConfig, path, {}, {})


@pytest.mark.parametrize(
    ("yaml", "flags", "environ"),
    [
        ({}, ["--max_steps", "10000000"], {}),
        ({"lora_target_modules": ["q_proj", "v_proj"], "use_wandb": True}, ["--no-use_wandb"], {}),
        ({"lora_target_modules": None, "num_workers": "auto", "seed": 2**31 - 1}, [], {"TUNESMITH_SEED": "7"}),
        ({"input_template": "a\\n{x}: 'b' \"c\" # {{ d }}\n\n", "field_mapping": {"x": "no"}}, ["--home", "/efs/a"], {}),
        ({"hf_dataset_config": {"dataset_name": "org/rows", "split": "train[:10%]"}}, ["--hfdc_num_proc=2"], {}),
        ({"run_name": "1e3", "dataset_name": "2024-01-01", "model_revision": "0x10"}, ["--min-learning-rate=1e-7"], {}),
    ],
)  # fmt: skip
def test_the_pods_load_the_very_config_that_train_would(
    yaml: dict[str, Any],
    flags: list[str],
    environ: dict[str, str],
    tunesmith: Tunesmith,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(write_yaml(yaml))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    exit_code, out, err = tunesmith("render", "run.yaml", *flags)
    assert exit_code == 0, err
    config = verbs._read_settings(VERBS["train"], TrainConfig, [str(path), *flags])
    assert config is not None
    rendered = read_rendered(out, tmp_path)
    assert rendered == config
    assert rendered.model_fields_set == config.model_fields_set


# Without what no chart can hold: control characters, and those that Helm's YAML loses.
TEXT = st.text(
    st.sampled_from("\n\t") | st.characters(exclude_categories=["C"], exclude_characters="\u2028\u2029"),
    min_size=1,
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "input_template": TEXT,
            "output_template": TEXT,
            "field_mapping": st.dictionaries(TEXT, TEXT, max_size=2),
            "lora_target_modules": st.lists(TEXT, min_size=1, max_size=2) | st.none(),
            "max_steps": st.integers(1, 2**53 - 1),
            "weight_decay": st.floats(0, 1),
            "full_ft": st.booleans(),
            "num_train_epochs": st.floats(1e-6, 1e6) | st.none(),
        },
    )
)
def test_any_config_reaches_the_pods_unchanged(
    tunesmith: Tunesmith, tmp_path: Path, given: dict[str, Any]
) -> None:
    config = TrainConfig(hf_model_id="a/b", **given)
    assert read_rendered(render(Release("my-run", config)), tmp_path) == config


def test_a_run_of_the_values_gives_way_to_the_config(
    tunesmith: Tunesmith, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tunesmith")
    (tmp_path / "sized.yaml").write_text("run: {lora_rank: 99, packing: false}\n")
    _, out, _ = tunesmith("render", "run.yaml", "-f", "sized.yaml", "--release", "my-run")
    assert out == template_by_hand({"run": SETTINGS})
    assert "`run` of the values gives way to `run.yaml`" in caplog.text


def test_without_a_home_the_release_has_its_own(tunesmith: Tunesmith) -> None:
    for flags in ([], ["--home=none"]):
        _, out, _ = tunesmith("render", "run.yaml", *flags)
        files = next(m["data"] for m in read_manifests(out) if m["metadata"]["name"].endswith("-job"))
        assert files["train.sh"].endswith('--home="$HOME"')
        env = container_of(pods_of(rayjob_of(read_manifests(out)))["head"])["env"]
        assert {"name": "HOME", "value": "/efs/home/run"} in env


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora_rank=0"], ["`--lora_rank` is `0`"]),
        (["--lora_rnk=8"], ["unknown flag `--lora_rnk`", "`--lora_rank`"]),
        (["--model_path=models/a", "--home=~/b"], ["`model_path` is `models/a`, `home` is `~/b`: relative", "--home=none"]),
        (["--dataset_name=cluster.yaml"], ["`dataset_name` is `cluster.yaml`: relative", "--dataset_name=/…"]),
        (["--dataset_name=absent.jsonl"], ["`dataset_name` is `absent.jsonl`: relative"]),
        (["--data_dir=a"], ["`data_dir` is `a`: relative"]),
        (["--hf_model_id=./models/a"], ["`hf_model_id` is `models/a`: relative"]),
        (["--hf_model_id=~/a"], ["`hf_model_id` is `~/a`: relative"]),
        (["-f", "absent.yaml"], ["there is no values file `absent.yaml`"]),
        (["-f", "-"], ["there is no values file `-`"]),
        (["--set", "imag=a"], ["additional properties 'imag'", "values.yaml"]),
        (["--set", "resources.nnodes=two"], ["at '/resources/nnodes': got string, want integer"]),
        (["--set", "elastic.min_nodes=2,elastic.max_nodes=1"], ["can't be used: elastic.min_nodes is 2, above"]),
        (["--set", "image=a,run.lora_rank=8"], ["`--set image=a,run.lora_rank=8` changes `run`", "--lora_rank 16"]),
        (["--set", "run={a}"], ["changes `run`"]),
        (["--set", "run-a=1"], ["additional properties 'run-a'"]),
        (["--set", "train.command=python"], ["`train.command` of the values says what is trained"]),
        (["--release", "My_Run"], ["`--release` is `My_Run`"]),
        (["--release", "a" * 54], ["at most 53 characters"]),
        (["--release"], ["`--release` has no value", "write `--release NAME`"]),
    ],
)  # fmt: skip
def test_what_cannot_work_on_the_cluster_is_refused_by_name(
    words: list[str], said: list[str], tunesmith: Tunesmith
) -> None:
    exit_code, out, err = tunesmith("render", "run.yaml", *words)
    assert (exit_code, out) == (2, "")
    for text in said:
        assert text in err
    assert "hint: " in err


def test_no_config_or_one_beside_a_run_of_the_values_is_refused(tunesmith: Tunesmith, tmp_path: Path) -> None:
    assert "no setting of the training is given" in tunesmith("render")[2]
    (tmp_path / "sized.yaml").write_text("run: {lora_rank: 99}\n")
    assert "flags alone can't change" in tunesmith("render", "--max_steps=5", "-f", "sized.yaml")[2]


def test_a_path_on_no_claim_is_warned_of(tunesmith: Tunesmith, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--model_path=/home/me/model", "--home=/efs/a", "--validation_dataset=/home/me/held.jsonl"]
    exit_code, _, _ = tunesmith("render", "run.yaml", "-f", "cluster.yaml", *flags)
    assert exit_code == 0
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["warning"] * 2
    assert "`validation_dataset` is `/home/me/held.jsonl`, on no claim" in caplog.text
    assert "`model_path` is `/home/me/model`, on no claim that the pods mount (/fsx, /efs)" in caplog.text


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        ([], True),
        (["--use_gpu=true"], True),
        (["--no-use_gpu"], False),
        (["-f", "cluster.yaml"], False),
        (["--set", r"resources.requests.nvidia\.com/mig-1g\.5gb=1,resources.limits.nvidia\.com/mig-1g\.5gb=1"], False),
    ],
)  # fmt: skip
def test_workers_without_gpus_are_warned_of_unless_they_are_meant(
    words: list[str], warned: bool, tunesmith: Tunesmith, caplog: pytest.LogCaptureFixture
) -> None:
    exit_code, _, err = tunesmith("render", "run.yaml", *words)
    assert exit_code == 0, err
    assert caplog.text.count("warning: the workers ask for no GPU") == warned


def test_the_package_comes_with_the_chart_where_the_values_ask_for_it(tunesmith: Tunesmith) -> None:
    exit_code, out, err = tunesmith("render", "run.yaml", "--set", "package.fromConfigMap=true")
    assert exit_code == 0, err
    packages = [m["binaryData"] for m in read_manifests(out) if m["metadata"]["name"] == "rayjob-run-package"]
    assert [base64.b64decode(package["tunesmith.zip"]) for package in packages] == [package_zip()]


def test_a_package_without_the_chart_says_so(tunesmith: Tunesmith, tmp_path: Path) -> None:
    (tmp_path / "tunesmith.zip").write_bytes(package_zip())
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "render", "run.yaml"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "tunesmith.zip")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: this tunesmith has no chart at")


def test_without_helm_the_remedy_is_named(tunesmith: Tunesmith, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    exit_code, _, err = tunesmith("render", "run.yaml")
    assert exit_code == 2
    assert "there is no `helm` on the PATH" in err
    assert "install Helm" in err


@pytest.mark.parametrize(
    ("config", "path", "name"),
    [
        ({}, "my_run.yaml", "my-run"),
        ({"run_name": "Sums, 2nd"}, "my_run.yaml", "sums-2nd"),
        ({"hf_model_id": "Qwen/Qwen2.5-0.5B"}, None, "qwen2-5-0-5b"),
        ({"run_name": "x" * 52 + "-y"}, None, "x" * 52),
    ],
)
def test_a_release_is_named_after_the_run_its_file_or_its_model(
    config: dict[str, Any], path: str | None, name: str
) -> None:
    assert choose_name(None, TrainConfig(**config), Path(path) if path else None) == name


@pytest.mark.parametrize("verb", ["render", "submit"])
def test_options_and_settings_have_different_names(verb: str) -> None:
    for option in VERBS[verb].options:
        assert find_field(TrainConfig, option.name[2:]) is None


@pytest.mark.slow
def test_an_installed_wheel_renders_what_the_checkout_does(tunesmith: Tunesmith, tmp_path: Path) -> None:
    """The chart comes with the wheel: built from a copy, so that no older build is part of it."""
    source = tmp_path / "source"
    source.mkdir()
    copied = ["src/tunesmith", "charts", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-a", "--parents", *copied, str(source)], cwd=REPOSITORY, check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    installed = tmp_path / "installed"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(installed)

    kept = {
        path.relative_to(CHART)
        for path in CHART.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".zip")
    }
    chart = installed / "tunesmith" / "chart" / "raytrain"
    assert {path.relative_to(chart) for path in chart.rglob("*") if path.is_file()} == kept

    words = ["render", "run.yaml", "-f", "cluster.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *words],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == tunesmith(*words)[1]

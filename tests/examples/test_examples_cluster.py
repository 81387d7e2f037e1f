"""The examples for a cluster: what they install is valid, fits together, and is what their README says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.helm import (
    CHART,
    Manifest,
    Values,
    container_of,
    helm,
    pods_of,
    rayjob_of,
    read_manifests,
    render,
    render_files,
)
from support.hub import serve_hub
from support.kuberay import find_core_errors
from support.paths import REPOSITORY
from support.values import EXAMPLES, read_run
from tunesmith.config import ConvertConfig, EvaluateConfig, Settings, TrainConfig
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import load_settings
from tunesmith.data.sources import read_rows

FOLDER = REPOSITORY / "examples"
README = (FOLDER / "qwen3-14b-sft" / "README.md").read_text()
RELEASE = "raytrain-qwen3-14b-sft"
HOME = f"/efs/home/{RELEASE}"
STEPS = {
    "fine-tune": ("fine_tune.py", TrainConfig),
    "evaluate": ("test_checkpoint.py", EvaluateConfig),
    "convert-hf": ("convert_checkpoint_to_hf.py", ConvertConfig),
}
JOB, POD = (yaml.safe_load((FOLDER / name).read_text()) for name in ("fetch-weights.yaml", "attach-pvc.yaml"))
FETCH = JOB["spec"]["template"]["spec"]["containers"][0]
WANTED = {entry["name"]: entry.get("value") for entry in FETCH["env"]}


def values_of(step: str) -> Values:
    return EXAMPLES[f"qwen3-14b-sft/{step}.yaml"]


def worker_environ(values: Values, release: str = RELEASE) -> dict[str, str]:
    worker = pods_of(rayjob_of(render(values, release)))["worker"]
    return {entry["name"]: entry["value"] for entry in container_of(worker)["env"] if "value" in entry}


def settings_of(step: str) -> Settings:
    """Return the settings that a step of qwen3-14b-sft gives its script, as the pod's shell hands them over."""
    script, model = STEPS[step]
    command = render_files(values_of(step), RELEASE)["train.sh"]
    told = subprocess.run(
        ["bash", "-euc", f"python() {{ printf '%s\\n' \"$@\"; }}; {command}"],
        env=worker_environ(values_of(step)),
        capture_output=True,
        text=True,
        check=True,
    )
    called, *words = told.stdout.splitlines()
    assert called == script
    return load_settings(model, None, parse_flags(model, words).values, {})


def test_every_example_is_at_hand() -> None:
    assert set(STEPS) <= {Path(name).stem for name in EXAMPLES if name.startswith("qwen3-14b-sft")}
    assert len([name for name in EXAMPLES if name.startswith("models/")]) == 8


@pytest.mark.parametrize("step", STEPS)
def test_each_step_calls_its_script_with_settings_that_exist(step: str) -> None:
    config = settings_of(step)
    assert str(config.model_path) == f"/fsx/pretrained-models/{WANTED['MODELS'].split()[0]}"
    scripts = {path.name for path in (CHART / "scripts" / "ray_train").iterdir()}
    assert STEPS[step][0] in scripts
    assert worker_environ(values_of(step))["SCRIPTS_DIR"] == "/etc/framework-scripts"


def test_the_steps_mean_one_run() -> None:
    trained = settings_of("fine-tune")
    for step in ("evaluate", "convert-hf"):
        assert settings_of(step).base_model == trained.hf_model_id
    encoder = WANTED["MODELS"].split()[1]
    assert settings_of("evaluate").bertscore_model == f"/fsx/pretrained-models/{encoder}"


@pytest.mark.parametrize("release", [RELEASE, "another-name"])
def test_the_steps_share_a_home_under_either_name(release: str) -> None:
    home = worker_environ(values_of("fine-tune"), release)["HOME"]
    assert home == f"/efs/home/{release}"
    for step, suffix in (("evaluate", "-evaluate"), ("convert-hf", "-convert")):
        for name in (release, release + suffix):
            assert worker_environ(values_of(step), name)["HOME"] == home


@pytest.mark.parametrize("name", [name for name in EXAMPLES if EXAMPLES[name].get("run")])
def test_runs_find_what_the_job_fetches(name: str, tmp_path: Path) -> None:
    config = read_run(EXAMPLES[name], tmp_path)
    assert str(config.model_path) == f"/fsx/pretrained-models/{config.hf_model_id}"
    assert config.dataset_name == f"/fsx/datasets/{WANTED['DATASET']}/{WANTED['DATASET_CONFIG']}"
    assert config.dataset_name == settings_of("fine-tune").dataset_name


@pytest.mark.parametrize("manifest", [JOB, POD], ids=["fetch-weights", "attach-pvc"])
def test_manifests_are_valid_and_mount_the_claims_of_the_chart(manifest: Manifest) -> None:
    assert find_core_errors(manifest) == []
    spec = manifest["spec"]["template"]["spec"] if manifest is JOB else manifest["spec"]
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"]}
    of_chart = {
        c["mount_path"]: c["name"] for c in yaml.safe_load((CHART / "values.yaml").read_text())["pvc"]
    }
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        mounted = {m["mountPath"]: claims[m["name"]] for m in container["volumeMounts"]}
        assert mounted.items() <= of_chart.items()
        assert mounted


@pytest.mark.parametrize("manifest", [JOB, POD], ids=["fetch-weights", "attach-pvc"])
def test_containers_are_restricted_but_for_the_one_that_hands_the_disk_over(manifest: Manifest) -> None:
    spec = manifest["spec"]["template"]["spec"] if manifest is JOB else manifest["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == restricted
    added = [c["securityContext"]["capabilities"].get("add") for c in spec.get("initContainers", [])]
    assert added == ([["CHOWN"]] if manifest is JOB else [])


@pytest.mark.slow
def test_the_job_fetches_models_and_rows_once(tmp_path: Path) -> None:
    (script,) = FETCH["args"]
    assert FETCH["command"] == ["bash", "-euc"]
    for model in WANTED["MODELS"].split():
        folder = tmp_path / "hub" / model
        for name in ("config.json", "a.safetensors", "tokenizer.model", "b.bin", "original/a.safetensors"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
    source = tmp_path / WANTED["DATASET"]
    source.mkdir(parents=True)
    (source / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {WANTED['DATASET_CONFIG']}\n  data_files: rows.jsonl\n---\n"
    )
    row = {"instruction": "a", "input": "b", "output": "c"}
    (source / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = tmp_path / "fsx" / "datasets" / WANTED["DATASET"] / WANTED["DATASET_CONFIG"]
    torn = rows.with_name(f"{rows.name}.unfinished")
    torn.mkdir(parents=True)

    with serve_hub(tmp_path / "hub") as (endpoint, sent):
        for wanted in (["a.safetensors", "config.json", "tokenizer.model"] * 2, []):
            subprocess.run(
                [*FETCH["command"], script.replace("/fsx", str(tmp_path / "fsx"))],
                cwd=tmp_path,
                env={
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    **{name: value for name, value in WANTED.items() if value is not None},
                    "HOME": str(tmp_path),
                    "HF_ENDPOINT": endpoint,
                },
                check=True,
            )
            assert sorted(sent) == sorted(wanted)
            sent.clear()
    for model in WANTED["MODELS"].split():
        assert (tmp_path / "fsx" / "pretrained-models" / model / "config.json").is_file()
    assert not torn.exists()
    assert [read for _, read in read_rows(TrainConfig(dataset_name=str(rows)))] == [row]


def test_the_disk_is_handed_over_only_by_root(tmp_path: Path) -> None:
    ((_, _, script),) = [c["command"] for c in JOB["spec"]["template"]["spec"]["initContainers"]]
    for owner, commands in ((0, ["chown 1000:1000 /fsx"]), (1000, []), (7, [])):
        told = subprocess.run(
            ["bash", "-c", f'stat() {{ echo {owner}; }}; chown() {{ echo "chown $*"; }}; {script}'],
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout.splitlines() == commands


def readme_blocks() -> list[list[str]]:
    """Return the commands of every block, which a reader may run as one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", "").splitlines() for block in blocks]


def readme_commands() -> list[str]:
    return [line for block in readme_blocks() for line in block]


def test_the_readme_installs_what_its_other_commands_name() -> None:
    shell = {"PATH": os.environ["PATH"], "NAMESPACE": "team", "IMAGE": "registry.example/tunesmith:0.1.0"}
    installed, jobs = {}, set()
    for command in readme_commands():
        if not command.startswith("helm install "):
            continue
        rendered = subprocess.run(
            ["bash", "-euc", command.replace("helm install", f"{helm()} template", 1)],
            cwd=REPOSITORY,
            env=shell,
            capture_output=True,
            text=True,
        )
        assert rendered.returncode == 0, rendered.stderr
        job = rayjob_of(read_manifests(rendered.stdout))
        assert job["metadata"]["namespace"] == "team"
        head = container_of(pods_of(job)["head"])
        assert head["image"] == shell["IMAGE"]
        assert {"name": "HOME", "value": HOME} in head["env"]
        installed[shlex.split(command)[2]] = job
        jobs.add(job["metadata"]["name"])
    assert set(installed) == {RELEASE, f"{RELEASE}-evaluate", f"{RELEASE}-convert"}
    assert {word.rpartition("/")[2] for word in words_of("kubectl") if "rayjob-" in word} == jobs
    assert {shlex.split(c)[2] for c in readme_commands() if c.startswith("helm uninstall ")} == set(installed)
    assert set(re.findall(r"/efs/home/[\w-]+", README)) == {HOME}
    assert {"attach-pvc", "job/fetch-weights"} <= set(words_of("kubectl"))


def test_the_readme_waits_for_each_job_before_it_uninstalls_any() -> None:
    for block in readme_blocks():
        installed = [shlex.split(line)[2] for line in block if line.startswith("helm install ")]
        waited = [word for line in block if line.startswith("kubectl wait ") for word in shlex.split(line)]
        for release in installed:
            assert f"rayjob/rayjob-{release}" in waited
            assert "--for=jsonpath={.status.jobStatus}=SUCCEEDED" in waited
            assert not [line for line in block if line.startswith("helm uninstall ")]


def words_of(program: str) -> list[str]:
    return [word for command in readme_commands() if program in command for word in shlex.split(command)]


def test_the_readme_names_files_that_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (FOLDER / "qwen3-14b-sft" / link).exists(), link
    for path in re.findall(r"(?:examples|charts)/[\w./-]+", README):
        assert (REPOSITORY / path).exists(), path


def test_the_readmes_converter_and_flags_work() -> None:
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    exec(re.sub(r"^  ", "", block, flags=re.MULTILINE), scope)
    row = {"context": "Sky is blue.", "question": "Is it?", "answers": ["Yes."]}
    assert scope["convert"](row) == {"input": "Sky is blue.\nIs it?\n", "output": "Yes."}
    flags = [word for word in re.findall(r"`(--[^`]+)`", README) if "=" in word]
    config = load_settings(TrainConfig, None, parse_flags(TrainConfig, flags).values, {})
    assert config.field_mapping == {"instruction": "question", "output": "answer"}

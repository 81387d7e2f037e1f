"""docs/eks.md and the files it applies agree with the chart, the examples and the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.helm import CHART, container_of, helm, pods_of, rayjob_of, read_manifests, render, render_job
from support.kuberay import find_core_errors
from support.paths import REPOSITORY
from tunesmith import cli
from tunesmith.config import TrainConfig

PAGE = (REPOSITORY / "docs" / "eks.md").read_text()
STORAGE = read_manifests((REPOSITORY / "examples/eks/storage.yaml").read_text())
CLUSTER = yaml.safe_load((REPOSITORY / "examples/eks/cluster.yaml").read_text())
IMAGE = "registry.example/tunesmith:0.1.0"


def commands() -> Iterator[list[str]]:
    """Give the words of every command of the page's shell blocks."""
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("helm install", "eksctl", ".venv/bin/")):
                yield shlex.split(line)


def submissions() -> Iterator[list[str]]:
    """Give the words of every `tunesmith submit` of the page and of the repository's README, variables expanded."""
    for text in (PAGE, (REPOSITORY / "README.md").read_text()):
        for line in text.replace("\\\n", " ").splitlines():
            _, program, rest = line.partition(".venv/bin/tunesmith submit ")
            if program and not line.startswith("`"):
                yield shlex.split(rest.replace("$IMAGE", IMAGE).replace("$NAMESPACE", "training"))


@pytest.mark.parametrize("manifest", STORAGE, ids=lambda manifest: manifest["metadata"]["name"])
def test_the_storage_is_valid(manifest: dict[str, object]) -> None:
    assert find_core_errors(manifest) == []


def test_the_claims_are_those_that_the_chart_mounts() -> None:
    made = [m["metadata"]["name"] for m in STORAGE if m["kind"] == "PersistentVolumeClaim"]
    mounted = [claim["name"] for claim in yaml.safe_load((CHART / "values.yaml").read_text())["pvc"]]
    assert sorted(made) == sorted(mounted)
    classes = {m["metadata"]["name"]: m["parameters"] for m in STORAGE if m["kind"] == "StorageClass"}
    assert {m["spec"]["storageClassName"] for m in STORAGE if "spec" in m} == set(classes)
    (efs,) = [parameters for parameters in classes.values() if "uid" in parameters]
    restricted = render_job({"podSecurity": "restricted"})
    head = restricted["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert int(efs["uid"]) == head["securityContext"]["runAsUser"]


def test_every_placeholder_is_replaced_by_the_page() -> None:
    placeholders = set(
        re.findall(r"\b[A-Z]+_[A-Z_]*ID\b", (REPOSITORY / "examples/eks/storage.yaml").read_text())
    )
    assert placeholders == set(re.findall(r"s/([A-Z_]+)/", PAGE))


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    headings = re.findall("^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in links:
        path, _, anchor = link.partition("#")
        assert (REPOSITORY / "docs" / path).exists() if path else anchor in anchors, link
    named = re.findall(r"\b(?:examples|charts)/[-\w./]+\.yaml", PAGE)
    assert named and all((REPOSITORY / path).exists() for path in named)


def test_named_nodes_are_those_of_the_cluster() -> None:
    groups = {group["name"]: group for group in CLUSTER["managedNodeGroups"]}
    for words in commands():
        if words[:2] == ["eksctl", "scale"]:
            assert words[words.index("--cluster") + 1] == CLUSTER["metadata"]["name"]
            group = groups[words[words.index("--name") + 1]]
            assert int(words[words.index("--nodes") + 1]) <= group["maxSize"]
    (gpu_group,) = [group for group in groups.values() if "taints" in group]
    example = yaml.safe_load((REPOSITORY / "examples/qwen3-14b-sft/fine-tune.yaml").read_text())
    assert example["resources"]["node_type"] == gpu_group["instanceType"]
    assert example["tolerations"][0]["key"] == gpu_group["taints"][0]["key"]
    assert gpu_group["availabilityZones"][0] in CLUSTER["availabilityZones"]


def test_named_objects_are_those_that_the_chart_makes() -> None:
    installed = [
        words for words in commands() if words[:2] == ["helm", "install"] and "charts/raytrain" in words
    ]
    releases = {
        words[2]: yaml.safe_load(Path(REPOSITORY, words[words.index("-f") + 1]).read_text())
        for words in installed
        if words[2] != "…"
    }
    made = [
        (m["kind"], m["metadata"]["name"])
        for release, values in releases.items()
        for m in render(values, release)
    ]
    for kind, named in (("RayJob", r"\brayjob-[-a-z0-9]+"), ("Service", r"\bserve-[-a-z0-9]+")):
        assert {name for of_kind, name in made if of_kind == kind} == set(re.findall(named, PAGE))


def test_named_settings_exist() -> None:
    settings = re.findall(r"`--([a-z_]+)=", PAGE)
    assert settings and set(settings) <= set(TrainConfig.model_fields)


@pytest.mark.parametrize("words", submissions(), ids=" ".join)
def test_what_is_submitted_renders_with_an_image_and_rows_that_the_pods_have(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "helm").symlink_to(helm())
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (tmp_path / "my_run.yaml").write_text("hf_model_id: Qwen/Qwen3-8B\ndataset_name: my_rows.jsonl\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    is_ray_job = "--wait" in words
    exit_code = cli.main(["render", *(word for word in words if word != "--wait")])
    out, err = capsys.readouterr()
    assert exit_code == 0, err
    if not is_ray_job:
        assert container_of(pods_of(rayjob_of(read_manifests(out)))["worker"])["image"] == IMAGE
        assert "warning" not in caplog.text


def test_every_way_to_submit_is_rendered() -> None:
    assert len(list(submissions())) == 3


def test_the_plugin_of_efa_is_made_to_tolerate_the_taint_of_the_gpu_nodes() -> None:
    (patch,) = re.findall(r"patch daemonset \S+ --type json --patch \\\n *'(.*?)'\n", PAGE, re.DOTALL)
    (change,) = json.loads(patch)
    (group,) = [group for group in CLUSTER["managedNodeGroups"] if "taints" in group]
    (taint,) = group["taints"]
    assert group["efaEnabled"]
    assert (change["op"], change["path"]) == ("add", "/spec/template/spec/tolerations/-")
    assert change["value"] == {"key": taint["key"], "operator": "Exists", "effect": taint["effect"]}


def test_the_sizes_of_the_image_agree() -> None:
    named = {
        path: re.findall(r"\d+ GB", line)
        for path in ("docs/eks.md", "Dockerfile", "examples/eks/cluster.yaml")
        for line in (REPOSITORY / path).read_text().splitlines()
        if re.search(r"(?i)about \d+ GB", line)
    }
    assert list(named.values()) == [["10 GB"]] * 3

"""The chart's server: a Deployment and a Service that are valid, and start what the values name."""

from __future__ import annotations

from typing import Any

import pytest

from support.helm import Manifest, Values, container_of, notes_of, render
from support.kuberay import find_core_errors
from support.values import SERVERS
from tunesmith.config import ServeConfig
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import load_settings
from tunesmith.options import split_passed_on
from tunesmith.verbs import VERBS

SERVED: Values = {"serve": {"enabled": True, "models": ["/efs/home/run"]}}


def serving(release: str = "my-run", **serve: Any) -> tuple[Manifest, Manifest]:
    """Return the Deployment and the Service of values whose `serve` holds these besides."""
    return objects_of({"serve": {**SERVED["serve"], **serve}}, release)


def objects_of(values: Values, release: str = "my-run") -> tuple[Manifest, Manifest]:
    kinds = {manifest["kind"]: manifest for manifest in render(values, release)}
    assert set(kinds) == {"Deployment", "Service"}
    return kinds["Deployment"], kinds["Service"]


def words_of(deployment: Manifest) -> list[str]:
    container = container_of(deployment["spec"]["template"])
    return [*container["command"], *container["args"]]


def environ_of(deployment: Manifest) -> dict[str, Any]:
    entries = container_of(deployment["spec"]["template"])["env"]
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}


CASES: dict[str, Values] = {
    "least": SERVED,
    "restricted": {**SERVED, "podSecurity": "restricted"},
    "disks": {**SERVED, "scratch": {"mount_path": "/scratch"}, "shared_memory": "8Gi", "pvc": []},
    "secret": {"serve": {**SERVED["serve"], "api_key": {"name": "serve", "key": "api-key"}}},
    "private image": {**SERVED, "image_pull_secrets": ["registry"], "service_account": "server"},
    "several": {"serve": {**SERVED["serve"], "models": ["/efs/a", "b=/efs/b"], "replicas": 3, "port": 9000}},
    "flags": {"serve": {**SERVED["serve"], "args": ["--max_model_len=4096"], "vllm_args": ["--seed", 3]}},
    "package": {**SERVED, "package": {"fromConfigMap": True}},
    **SERVERS,
}


@pytest.mark.parametrize("case", CASES)
def test_every_object_is_valid(case: str) -> None:
    manifests = render(CASES[case])
    assert [error for manifest in manifests for error in find_core_errors(manifest)] == []
    deployment = next(m for m in manifests if m["kind"] == "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    mounted = [mount["name"] for mount in container_of(deployment["spec"]["template"])["volumeMounts"]]
    assert sorted(mounted) == sorted(volume["name"] for volume in spec["volumes"])
    service = next(m for m in manifests if m["kind"] == "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]


@pytest.mark.parametrize("case", CASES)
def test_the_words_are_those_of_the_command(case: str) -> None:
    """The container's words are read as `tunesmith serve` reads them."""
    deployment = next(m for m in render(CASES[case]) if m["kind"] == "Deployment")
    words = words_of(deployment)
    assert words[:4] == ["python", "-m", "tunesmith", "serve"] and words[3] in VERBS
    own, passed_on = split_passed_on(words[4:])
    flags = parse_flags(ServeConfig, own, "checkpoints_dir", "more")
    config = load_settings(ServeConfig, None, flags.values, {})
    serve = CASES[case]["serve"]
    assert [config.checkpoints_dir, *(config.more or [])] == serve["models"]
    assert (config.host, config.port) == ("0.0.0.0", serve.get("port", 8000))
    assert passed_on == [str(word) for word in serve.get("vllm_args", [])]


@pytest.mark.parametrize("release", ["a", "7", "a.b", "y" * 53, f"{'z' * 37}.{'z' * 9}"])
def test_every_release_has_a_valid_name_of_its_own(release: str) -> None:
    deployment, service = serving(release)
    name = deployment["metadata"]["name"]
    assert len(name) <= 63 and "." not in name and service["metadata"]["name"] == name
    assert (name == f"serve-{release}") == ("." not in release)


def test_nothing_is_trained_unless_asked() -> None:
    serving()
    kinds = [
        m["kind"] for m in render({"serve": {**SERVED["serve"], "train_too": True}, "run": {"max_steps": 5}})
    ]
    assert sorted(kinds) == ["ConfigMap", "ConfigMap", "Deployment", "RayJob", "Service"]
    assert "Deployment" not in [m["kind"] for m in render({"serve": {"enabled": False, "models": ["/a"]}})]


def test_gpus_nodes_tolerations_and_a_patch_reach_the_pod() -> None:
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    gpus = {"nvidia.com/gpu": 2}
    serve = {
        **SERVED["serve"],
        "resources": {"node_type": "g6.12xlarge", "requests": gpus, "limits": gpus},
        "podSpec": {
            "priorityClassName": "high",
            "containers": [{"name": "vllm", "env": [{"name": "A", "value": "1"}]}],
        },
    }
    deployment, _ = objects_of({"serve": serve, "tolerations": tolerations, "image": "registry.example/a:1"})
    spec = deployment["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"node.kubernetes.io/instance-type": "g6.12xlarge"}
    assert spec["tolerations"] == tolerations
    assert spec["priorityClassName"] == "high"
    container = container_of(deployment["spec"]["template"])
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert container["image"] == "registry.example/a:1"
    assert environ_of(deployment)["A"] == "1"
    # No variables of services: TUNESMITH_PORT would be read as a setting.
    assert spec["enableServiceLinks"] is False


def test_probes_ask_vllms_health_and_wait_for_the_weights() -> None:
    container = container_of(serving(startup_seconds=605, port=9000)[0]["spec"]["template"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 610
    assert container["ports"] == [{"name": "http", "containerPort": 9000}]


def test_the_key_comes_from_a_secret_and_the_environment_as_given() -> None:
    key = {"name": "serve", "key": "api-key"}
    deployment, _ = serving(api_key=key, env=[{"name": "HF_HOME", "value": "/efs/{{ .Release.Name }}"}])
    assert environ_of(deployment) == {
        "HOME": "/tmp",
        "VLLM_API_KEY": {"secretKeyRef": key},
        "HF_HOME": "/efs/my-run",
    }
    assert environ_of(serving(env=[{"name": "HOME", "value": "/efs"}])[0]) == {"HOME": "/efs"}


def test_memory_is_shared_between_the_processes_of_several_gpus() -> None:
    spec = serving()[0]["spec"]["template"]["spec"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory"}} in spec["volumes"]
    limited, _ = objects_of({**SERVED, "shared_memory": "8Gi"})
    volumes = limited["spec"]["template"]["spec"]["volumes"]
    assert [v["emptyDir"] for v in volumes if v["name"] == "shared-memory"] == [
        {"medium": "Memory", "sizeLimit": "8Gi"}
    ]


def test_notes_say_how_to_ask() -> None:
    values = {"serve": {**SERVED["serve"], "api_key": {"name": "serve", "key": "api.key"}}}
    notes = notes_of(values)
    for said in (
        "kubectl rollout status -n team deployment/serve-my-run",
        "http://serve-my-run.team:8000/v1",
        "kubectl port-forward -n team service/serve-my-run 8000:8000",
        "jsonpath='{.data.api\\.key}'",
        "helm uninstall -n team my-run",
    ):
        assert said in notes
    assert "rayjob" not in notes

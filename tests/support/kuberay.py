"""What an API server and KubeRay's operator would refuse, found without either."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from support.helm import Manifest, container_of, pods_of
from support.paths import SHARED

Schema = dict[str, Any]

_CRD = SHARED / "crds" / "rayjobs-v1.7.0.v1.json"
_KUBERNETES = "1.34.0"
_KEPT = ("type", "enum", "pattern", "required", "minimum", "maximum", "minLength", "maxLength", "maxItems")
_RANGES = {"int32": 2**31, "int64": 2**63}


def find_core_errors(manifest: Manifest) -> list[str]:
    """Return what kubernetes-validate finds in an object of a core kind, unknown fields included."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    try:
        kubernetes_validate.validate(manifest, _KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def find_pod_errors(job: Manifest) -> list[str]:
    """Return what is wrong with the job's pods, as pods by themselves."""
    found = []
    for component, pod in pods_of(job).items():
        errors = find_core_errors({"apiVersion": "v1", "kind": "Pod", **pod})
        found += [f"{component}: {error}" for error in errors]
        volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
        mounts = container_of(pod)["volumeMounts"]
        found += [f"{component}: no volume {m['name']}" for m in mounts if m["name"] not in volumes]
        paths = [mount["mountPath"] for mount in mounts]
        if len(set(paths)) < len(paths) or len(set(volumes)) < len(volumes):
            found.append(f"{component}: {paths} or {volumes} twice")
    return found


def find_kuberay_errors(job: Manifest) -> list[str]:
    """Return which of KubeRay's own rules the RayJob breaks (its validation.go and the documentation of RayJob)."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    policies = {pod["spec"].get("restartPolicy", "Never") for pod in pods_of(job).values()}
    elastic = cluster.get("enableInTreeAutoscaling", False)
    rules = {
        "a name of 47 characters, DNS-1035": re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"]),
        "a submission mode": spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode"),
        "a submitter's template in K8sJobMode alone": spec["submissionMode"] == "K8sJobMode",
        "suspend with shutdownAfterJobFinishes": not spec.get("suspend") or spec["shutdownAfterJobFinishes"],
        "a queue with suspend": "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"] or spec["suspend"],
        "Kueue without autoscaling": not (spec.get("suspend") and elastic),
        "one way of deletion": not ("deletionStrategy" in spec and "ttlSecondsAfterFinished" in spec),
        "a positive deadline": spec.get("activeDeadlineSeconds", 1) > 0,
        "no negative backoff": spec["backoffLimit"] >= 0,
        "pods that are never restarted": policies == {"Never"},
        "rayStartParams or resources": not any("resources" in group for group in [head, *workers]),
        "rayStartParams are text": all(isinstance(v, str) for v in head["rayStartParams"].values()),
        "no GPU on the head": head["rayStartParams"]["num-gpus"] == "0",
        "replicas within bounds": all(g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in workers),
        "one size without the autoscaler": elastic or all(g["minReplicas"] == g["maxReplicas"] for g in workers),
        "a version": re.match(r"\d+\.\d+", cluster["rayVersion"]),
        "an entrypoint that a shell leaves as it is": re.fullmatch(r"[-\w./ ]+", spec["entrypoint"]),
    }  # fmt: skip
    return [rule for rule, holds in rules.items() if not holds]


def find_crd_errors(job: Manifest) -> list[str]:
    """Return what the CRD of KubeRay 1.7 refuses, unknown fields included."""
    spec = {"spec": job["spec"]}
    errors = sorted(_crd_validator().iter_errors(spec), key=lambda error: list(map(str, error.path)))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def crd_is_at_hand() -> bool:
    return _crd_path().is_file()


def skip_without_crd() -> None:
    if not crd_is_at_hand():
        pytest.skip(
            f"no CRD at `{_crd_path()}`: set TUNESMITH_RAYJOB_CRD to KubeRay 1.7's ray.io_rayjobs CRD, as JSON"
        )


def _crd_path() -> Path:
    return Path(os.environ.get("TUNESMITH_RAYJOB_CRD") or _CRD)


@cache
def _crd_validator() -> jsonschema.Draft202012Validator:
    versions = json.loads(_crd_path().read_text())["spec"]["versions"]
    structural = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    checker = jsonschema.FormatChecker(formats=())
    for name, bound in _RANGES.items():
        checker.checks(name)(lambda value, bound=bound: not isinstance(value, int) or -bound <= value < bound)
    spec = _as_json_schema(structural["properties"]["spec"])
    schema = {"type": "object", "properties": {"spec": spec}}
    return jsonschema.Draft202012Validator(schema, format_checker=checker)


def _as_json_schema(structural: Schema) -> Schema:
    """Turn a CRD's structural schema into a JSON schema that refuses what the API server would prune."""
    schema = {key: structural[key] for key in (*_KEPT, "format") if key in structural}
    if "x-kubernetes-int-or-string" in structural:
        schema["type"] = ["integer", "string"]
    properties = structural.get("properties", {})
    if properties:
        schema["properties"] = {name: _as_json_schema(value) for name, value in properties.items()}
    defaulted = [name for name, value in properties.items() if "default" in value]
    if "required" in schema:
        schema["required"] = [name for name in schema["required"] if name not in defaulted]
    if "items" in structural:
        schema["items"] = _as_json_schema(structural["items"])
    extra = structural.get("additionalProperties")
    if isinstance(extra, dict):
        schema["additionalProperties"] = _as_json_schema(extra)
    elif structural.get("type") == "object" and "x-kubernetes-preserve-unknown-fields" not in structural:
        schema["additionalProperties"] = bool(extra)
    return schema

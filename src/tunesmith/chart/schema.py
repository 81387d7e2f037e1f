"""`values.schema.json` of the Helm chart: `python -m tunesmith.chart.schema` prints it.

`run` follows from the settings' declaration; `values.yaml` says what the other keys mean.
"""

from __future__ import annotations

import json
from typing import Any

from tunesmith.config import TrainConfig
from tunesmith.config.reference import json_schema

Schema = dict[str, Any]

_PODS = ("head", "worker", "submitter")
_NAME = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"^{_NAME}(\.{_NAME})*$"
"""Names of claims, secrets, … and of Helm's releases."""
_LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
# As the API server reads quantities, without a sign.
_QUANTITY = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?"
_QUALIFIED_NAME = rf"^({_NAME}(\.{_NAME})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$"
# With a letter, and no two dashes in a row; Helm's expressions have no look-ahead.
_PORT_NAME = "^([0-9]+-)*[0-9]*[a-z][a-z0-9]*(-[a-z0-9]+)*$"


def values_schema() -> Schema:
    """Return the JSON schema (draft 7, which every Helm 3 and 4 reads) of the chart's values."""
    run = json_schema(TrainConfig)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart raytrain",
        **_object(
            {
                "global": {"type": "object"},  # Helm adds it to the values of a dependency
                "framework": _optional(_text(r"^([A-Za-z0-9][-A-Za-z0-9_]*)?$")),
                **_pods(),
                **_storage(),
                **_scripts(),
                "run": _optional({key: run[key] for key in ("type", "additionalProperties", "properties")}),
                **_scheduling(),
                **{name: _optional(_object({"podSpec": _optional(_ANY_OBJECT)})) for name in _PODS},
                "serve": _serving(),
            },
            required=["ray", "resources", "serve"],
        ),
    }


def _object(properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**schema, "required": required} if required else schema


def _array(items: Schema) -> Schema:
    return {"type": ["array", "null"], "items": items}


def _text(pattern: str, longest: int | None = None) -> Schema:
    schema: Schema = {"type": "string", "pattern": pattern}
    return {**schema, "maxLength": longest} if longest else schema


def _count(least: int, most: int = 2**31 - 1) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _optional(schema: Schema) -> Schema:
    """Let a key be null, as YAML has one with nothing after it."""
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {**schema, "type": [*types, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


_ANY_OBJECT: Schema = {"type": "object"}
_SCALAR: Schema = {"type": ["string", "number", "boolean"]}
_MOUNT_PATH = _text(r"^/[^:\s]*$")
# One schema, not two to choose from: only so does Helm say what is wrong.
_A_QUANTITY: Schema = {"type": ["number", "string"], "minimum": 0, "pattern": f"^{_QUANTITY}$"}
_SHELL_TEXT: Schema = {"anyOf": [{"type": ["string", "null"]}, _array(_SCALAR)]}


_QUANTITIES: Schema = {
    "type": ["object", "null"],
    "propertyNames": {"pattern": _QUALIFIED_NAME},
    "additionalProperties": _A_QUANTITY,
}
_RESOURCES = {"requests": _QUANTITIES, "limits": _QUANTITIES}


def _pods() -> dict[str, Schema]:
    port = {"name": _text(_PORT_NAME, 15), "port": _count(1, 65535)}
    ray: dict[str, Schema] = {
        "version": {"type": ["string", "number"], "pattern": r"^[0-9]+\.[0-9]+(\.[0-9]+)?([-+.a-z0-9]*)$"},
        "dashboard": _object({"host": _text(r"^[-A-Za-z0-9.:]+$")}, required=["host"]),
        "ports": _array(_object(port, required=["name", "port"])),
        "resources": _optional(_object(_RESOURCES)),
        "runtime_env_yaml": {"type": ["string", "object", "null"]},
    }
    worker = {**_RESOURCES, "nnodes": _count(1), "node_type": _optional(_text(_LABEL_VALUE))}
    toleration: dict[str, Schema] = {
        "key": _text(_QUALIFIED_NAME),
        "operator": {"enum": ["Exists", "Equal"]},
        "value": {**_SCALAR, "pattern": _LABEL_VALUE},
        "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        "tolerationSeconds": _count(0),
    }
    return {
        "ray": _object(ray, required=["version", "dashboard"]),
        "image": _optional(_text(r"^\S*$")),
        "image_pull_policy": {"enum": ["Always", "IfNotPresent", "Never", None]},
        "image_pull_secrets": _array(_text(SUBDOMAIN, 253)),
        "package": _optional(_object({"fromConfigMap": {"type": ["boolean", "null"]}})),
        "service_account": _optional(_text(f"{SUBDOMAIN}|^$", 253)),
        "podSecurity": {"enum": ["image", "restricted"]},
        "resources": _object(worker, required=["nnodes"]),
        "tolerations": _array(_object(toleration)),
        "efa": _optional(
            _object({"interfaces": _count(1), "hugepages": _A_QUANTITY}, required=["interfaces", "hugepages"])
        ),
    }


def _storage() -> dict[str, Schema]:
    claim = {"name": _text(SUBDOMAIN, 253), "mount_path": _MOUNT_PATH}
    ebs = {
        "storage": _A_QUANTITY,
        "mount_path": _MOUNT_PATH,
        "storage_class": _optional(_text(SUBDOMAIN, 253)),
    }
    scratch = {"mount_path": _MOUNT_PATH, "size_limit": _optional(_A_QUANTITY)}
    return {
        "pvc": _array(_object(claim, required=["name", "mount_path"])),
        "ebs": _optional(_object(ebs, required=["storage", "mount_path"])),
        "scratch": _optional(_object(scratch, required=["mount_path"])),
        "shared_memory": _optional({**_A_QUANTITY, "pattern": f"^({_QUANTITY})?$"}),
    }


_VARIABLE = {
    "name": _text(r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"),
    "value": _optional(_SCALAR),
    "valueFrom": _ANY_OBJECT,
}
_ENV = _array({**_object(_VARIABLE, required=["name"]), "not": {"required": ["value", "valueFrom"]}})


def _scripts() -> dict[str, Schema]:
    # Text alone: of the commit 1234e56 and the branch 1.10 YAML makes other numbers.
    git = dict.fromkeys(("repo_url", "branch", "commit"), _optional({"type": "string"}))
    train = {"env": _ENV, "command": _SHELL_TEXT, "args": _SHELL_TEXT}
    return {
        "git": _optional(_object(git)),
        **dict.fromkeys(("inline_script", "pre_script", "post_script"), _SHELL_TEXT),
        "train": _optional(_object(train)),
    }


def _scheduling() -> dict[str, Schema]:
    job = {
        "ttl_seconds": _optional(_count(0)),
        "deadline_seconds": _optional(_count(1)),
        "backoff_limit": _optional(_count(0)),
        "queue": _optional(_text(_LABEL_VALUE)),
    }
    nodes = {"min_nodes": _count(0), "max_nodes": _count(1)}
    return {
        "job": _optional(_object(job)),
        "elastic": _optional(_object(nodes, required=["min_nodes", "max_nodes"])),
        "spot": _optional(_object({"grace_period_seconds": _count(30)}, required=["grace_period_seconds"])),
    }


def _serving() -> Schema:
    key = {"name": _text(SUBDOMAIN, 253), "key": _text(r"^[-._a-zA-Z0-9]+$", 253)}
    words = _array(_SCALAR)
    serve: dict[str, Schema] = {
        "enabled": {"type": "boolean"},
        "train_too": {"type": ["boolean", "null"]},
        "models": _array(_text(r"^[^-\s].*$")),
        "args": words,
        "vllm_args": words,
        "replicas": _count(0),
        "port": _count(1, 65535),
        "api_key": _optional(_object(key, required=["name", "key"])),
        "resources": _optional(_object({**_RESOURCES, "node_type": _optional(_text(_LABEL_VALUE))})),
        "env": _ENV,
        "startup_seconds": _count(1, 7 * 24 * 3600),
        "podSpec": _optional(_ANY_OBJECT),
    }
    return _object(serve)


if __name__ == "__main__":
    print(json.dumps(values_schema(), indent=2, ensure_ascii=False))

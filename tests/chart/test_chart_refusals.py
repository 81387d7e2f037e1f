"""Values that can't work are refused before anything is installed, by their key's name."""

from __future__ import annotations

import pytest

from support.helm import Values, refusal

REFUSED: dict[str, tuple[Values, list[str]]] = {
    "unknown key": ({"resource": {}}, ["'resource'"]),
    "misspelt key of a group": ({"train": {"comand": ["x"]}}, ["/train", "'comand'"]),
    "misspelt key of an entry": ({"pvc": [{"name": "a", "mountPath": "/a"}]}, ["/pvc/0", "'mountPath'", "'mount_path'"]),
    "wrong type": ({"resources": {"nnodes": "two"}}, ["/resources/nnodes", "want integer"]),
    "no workers": ({"resources": {"nnodes": 0}}, ["/resources/nnodes"]),
    "half a worker": ({"resources": {"nnodes": 1.5}}, ["/resources/nnodes"]),
    "missing group": ({"resources": None}, ["'resources'"]),
    "version as an ambiguous number": ({"ray": {"version": 2.60}}, ["ray.version", "'2.60.0'"]),
    "version that is none": ({"ray": {"version": "latest"}}, ["/ray/version"]),
    "port name": ({"ray": {"ports": [{"name": "Dash Board", "port": 1}]}}, ["/ray/ports/0/name"]),
    "port number": ({"ray": {"ports": [{"name": "a", "port": 70000}]}}, ["/ray/ports/0/port"]),
    "runtime environment that isn't YAML": ({"ray": {"runtime_env_yaml": "pip: ["}}, ["ray.runtime_env_yaml"]),
    "runtime environment that is a list": ({"ray": {"runtime_env_yaml": "- pip"}}, ["ray.runtime_env_yaml"]),
    "pull policy": ({"image_pull_policy": "Sometimes"}, ["/image_pull_policy"]),
    "security policy": ({"podSecurity": "baseline"}, ["/podSecurity"]),
    "quantity": ({"resources": {"limits": {"memory": "900 GB"}}}, ["/resources/limits/memory", "does not match pattern"]),
    "negative quantity": ({"resources": {"limits": {"memory": -1}}}, ["/resources/limits/memory", "got -1, want 0"]),
    "size of shared memory": ({"shared_memory": "64 GB"}, ["/shared_memory", "does not match pattern"]),
    "framework that isn't there": ({"framework": "lightning"}, ["framework", "scripts/lightning"]),
    "framework outside": ({"framework": "../templates"}, ["/framework"]),
    "name of a variable": ({"train": {"env": [{"name": "A B", "value": "1"}]}}, ["/train/env/0/name"]),
    "value and its source": ({"train": {"env": [{"name": "A", "value": "1", "valueFrom": {}}]}}, ["/train/env/0"]),
    "template that is malformed": ({"train": {"env": [{"name": "A", "value": "{{ .Nope"}]}}, ["{{ .Nope"]),
    "number too large": ({"train": {"args": [2**60]}}, ["train.args", "in quotes"]),
    "number too large for env": ({"train": {"env": [{"name": "A", "value": -(2**60)}]}}, ["train.env A", "in quotes"]),
    "control character": ({"pre_script": ["a\x85b"]}, ["pre_script", "control character"]),
    "line separator": ({"image": "x", "post_script": "a\u2028b"}, ["post_script", "control character"]),
    "key of a toleration": ({"tolerations": [{"key": "a b"}]}, ["/tolerations/0/key"]),
    "package as text": ({"package": {"fromConfigMap": "yes"}}, ["/package/fromConfigMap", "boolean"]),
    "package behind a path from elsewhere": (
        {"package": {"fromConfigMap": True}, "train": {"env": [{"name": "PYTHONPATH", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}},
        ["package.fromConfigMap", "train.env", "valueFrom"],
    ),
    "unequal GPUs": ({"resources": {"requests": {"nvidia.com/gpu": 8}}}, ["resources: nvidia.com/gpu", "8 and none"]),
    "GPU on the head": ({"ray": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, ["ray.resources", "no GPU"]),
    "huge pages alone": ({"efa": {"interfaces": 1, "hugepages": "1Gi"}}, ["hugepages-2Mi", "memory"]),
    "efa without pages": ({"efa": {"interfaces": 1}}, ["/efa", "'hugepages'"]),
    "branch as a number": ({"git": {"repo_url": "x", "branch": 1.10}}, ["/git/branch", "want null or string"]),
    "disk without a place": ({"ebs": {"storage": "1Gi"}}, ["/ebs", "'mount_path'"]),
    "two volumes in one place": ({"scratch": {"mount_path": "/efs"}}, ["mount_path", "/efs"]),
    "relative path": ({"pvc": [{"name": "a", "mount_path": "efs"}]}, ["/pvc/0/mount_path"]),
    "name of a claim": ({"pvc": [{"name": "pv_efs", "mount_path": "/efs"}]}, ["/pvc/0/name"]),
    "deadline in the past": ({"job": {"deadline_seconds": 0}}, ["/job/deadline_seconds"]),
    "negative backoff": ({"job": {"backoff_limit": -1}}, ["/job/backoff_limit"]),
    "queue": ({"job": {"queue": "team a"}}, ["/job/queue"]),
    "elastic the wrong way": ({"elastic": {"min_nodes": 3, "max_nodes": 2}}, ["elastic.min_nodes", "elastic.max_nodes"]),
    "more nodes than elastic": (
        {"resources": {"nnodes": 5}, "elastic": {"min_nodes": 1, "max_nodes": 2}},
        ["resources.nnodes", "elastic.max_nodes"],
    ),
    "elastic in a queue": (
        {"elastic": {"min_nodes": 1, "max_nodes": 2}, "job": {"queue": "a"}},
        ["elastic", "job.queue"],
    ),
    "too short a grace": ({"spot": {"grace_period_seconds": 10}}, ["/spot/grace_period_seconds"]),
    "unknown setting of the run": ({"run": {"lora_rnk": 8}}, ["/run", "'lora_rnk'"]),
    "wrong type in the run": ({"run": {"lora_rank": "many"}}, ["/run/lora_rank"]),
    "out of range in the run": ({"run": {"lora_dropout": 1.5}}, ["/run/lora_dropout"]),
    "unknown setting of the data set": ({"run": {"hf_dataset_config": {"subset": "a"}}}, ["/run/hf_dataset_config", "'subset'"]),
    "server of nothing": ({"serve": {"enabled": True}}, ["serve.models", "name the runs"]),
    "flag as a model": ({"serve": {"enabled": True, "models": ["--port=1"]}}, ["/serve/models/0"]),
    "server's unequal GPUs": (
        {"serve": {"enabled": True, "models": ["/a"], "resources": {"limits": {"nvidia.com/gpu": 1}}}},
        ["serve.resources: nvidia.com/gpu", "none and 1"],
    ),
    "server's port": ({"serve": {"port": 0}}, ["/serve/port"]),
    "secret without its key": ({"serve": {"api_key": {"name": "a"}}}, ["/serve/api_key", "'key'"]),
    "unknown key of a server": ({"serve": {"model": "/a"}}, ["/serve", "'model'"]),
    "unknown key of a pod": ({"worker": {"pod_spec": {}}}, ["/worker", "'pod_spec'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_cannot_work_are_refused_by_name(case: str) -> None:
    values, named = REFUSED[case]
    said = refusal(values)
    for name in named:
        assert name in said, said

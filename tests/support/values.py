"""Values files for the chart: those of the example it follows, and one for each option."""

from __future__ import annotations

from pathlib import Path

import yaml

from support.helm import Values, render_files
from support.paths import REPOSITORY
from tunesmith.config import TrainConfig
from tunesmith.config.layers import load_settings

GPUS = {"nvidia.com/gpu": 8}
# As the raytrain chart of aws-samples is given them.
FINE_TUNE: Values = {
    "framework": "ray_train",
    "ray": {
        "version": "2.52.1",
        "dashboard": {"host": "0.0.0.0"},
        "ports": [
            {"name": "gcs-server", "port": 6379},
            {"name": "client", "port": 10001},
            {"name": "dashboard", "port": 8265},
        ],
        "resources": {"requests": {"cpu": "300m"}, "limits": {"cpu": 2}},
        "runtime_env_yaml": {"runtimeEnvYAML": "pip:\n  - wandb==0.23.0\n  - liger-kernel==0.7.0\n"},
    },
    "image": None,
    "image_pull_policy": "Always",
    "ebs": {"storage": "200Gi", "mount_path": "/tmp"},
    "resources": {
        "requests": {**GPUS, "vpc.amazonaws.com/efa": 4},
        "limits": {**GPUS, "vpc.amazonaws.com/efa": 4},
        "nnodes": 2,
        "node_type": "p4d.24xlarge",
    },
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "pre_script": ["mkdir -p $HOME/logs", "PROCESS_LOG=$HOME/logs/fine_tune.log", "cd $SCRIPTS_DIR"],
    "train": {
        "env": [
            {"name": "HOME", "value": "/efs/home/{{ .Release.Name }}"},
            {"name": "MODEL_PATH", "value": "/fsx/pretrained-models/Qwen/Qwen3-14B"},
            {"name": "NCCL_SOCKET_IFNAME", "value": "^lo,docker0"},
            {"name": "FI_EFA_USE_DEVICE_RDMA", "value": "1"},
            {"name": "SCRIPTS_DIR", "value": "/etc/framework-scripts"},
        ],
        "command": ["python"],
        "args": [
            "fine_tune.py",
            '--hf_model_id="Qwen/Qwen3-14B"',
            "--model_path=$MODEL_PATH",
            "--early_stopping_threshold=0.0001",
            "2>&1 | tee $PROCESS_LOG",
        ],
    },
}
FROM_GIT: Values = {
    "framework": "",
    "ray": {"version": "2.45.0"},
    "image": None,
    "resources": {
        "requests": {"nvidia.com/gpu": 1},
        "limits": {"nvidia.com/gpu": 1},
        "node_type": "g6.2xlarge",
    },
    "pvc": [{"name": "pv-efs", "mount_path": "/efs"}],
    "git": {
        "repo_url": "https://github.com/ray-project/kuberay.git",
        "branch": "master",
        "commit": "0ea404b8",
    },
    "pre_script": ["export LOGS_DIR=$HOME/logs/$HOSTNAME", "mkdir -p $LOGS_DIR"],
    "post_script": ["rm -rf $LOGS_DIR"],
    "train": {
        "env": [{"name": "HOME", "value": "/efs/home/{{ .Release.Name }}"}],
        "command": ["python"],
        "args": ["ray-operator/config/samples/fine-tune.py", "2>&1 | tee $OUTPUT_LOG"],
    },
}

MATRIX: dict[str, Values] = {
    "nothing": {},
    "fine-tune": FINE_TUNE,
    "from git": FROM_GIT,
    "empty groups": dict.fromkeys(
        ["git", "package", "train", "run", "job", "head", "worker", "ebs", "pvc", "tolerations", "pre_script", "framework"]
    ),
    "empty entries": {
        "image": None,
        "ray": {"runtime_env_yaml": None, "ports": None, "resources": None},
        "resources": {"node_type": None, "requests": None, "limits": None},
        "git": {"repo_url": None, "branch": None, "commit": None},
        "job": {"ttl_seconds": None, "deadline_seconds": None, "backoff_limit": None, "queue": None},
        "train": {"env": None, "command": None, "args": None},
        "podSecurity": None,
        "image_pull_policy": None,
    },
    "runtime environment as text": {"ray": {"runtime_env_yaml": "pip: [wandb]"}},
    "runtime environment as a mapping": {"ray": {"runtime_env_yaml": {"env_vars": {"A": "1"}}}},
    "version as a number": {"ray": {"version": 2.52}},
    "image": {"image": "registry.example/tunesmith@sha256:abc", "image_pull_secrets": ["registry"]},
    "package": {"package": {"fromConfigMap": True}, "image": "rayproject/ray:2.60.0-py311-gpu"},
    "package in the image": {"package": {"fromConfigMap": False}},
    "service account": {"service_account": "trainer"},
    "restricted": {"podSecurity": "restricted"},
    "tolerations": {
        "tolerations": [{"key": "team", "operator": "Equal", "value": True, "effect": "NoExecute", "tolerationSeconds": 60}]
    },
    "no claims": {"pvc": []},
    "disk with a class": {"ebs": {"storage": "1Ti", "mount_path": "/scratch", "storage_class": "gp3"}},
    "scratch": {"scratch": {"mount_path": "/scratch"}},
    "scratch with a limit": {"scratch": {"mount_path": "/scratch", "size_limit": "500Gi"}},
    "shared memory": {"shared_memory": "64Gi"},
    "efa": {"resources": {"limits": {"memory": "900Gi"}}, "efa": {"interfaces": 4, "hugepages": "5120Mi"}},
    "one text": {"pre_script": "set -x\npip list", "post_script": "echo done", "inline_script": "true"},
    "scripts alone": {"pre_script": ["echo nothing to train"]},
    "run": {"run": {"hf_model_id": "Qwen/Qwen3-14B", "hf_dataset_config": {"dataset_name": "a/b"}}},
    "limits": {"job": {"ttl_seconds": 0, "deadline_seconds": 86400, "backoff_limit": 3}},
    "queue": {"job": {"queue": "team-a"}},
    "elastic": {"resources": {"nnodes": 2}, "elastic": {"min_nodes": 1, "max_nodes": 4}},
    "spot": {"spot": {"grace_period_seconds": 120}},
    "patched pods": {
        "head": {"podSpec": {"nodeSelector": {"pool": "cpu"}, "priorityClassName": "high"}},
        "worker": {
            "podSpec": {
                "containers": [
                    {"name": "ray-worker", "env": [{"name": "A", "value": "1"}]},
                    {"name": "side", "image": "busybox:1"},
                ],
                "volumes": [{"name": "cache", "emptyDir": {}}],
                "securityContext": {"fsGroup": None, "supplementalGroups": [44]},
            }
        },
        "submitter": {"podSpec": {"nodeSelector": {"pool": "cpu"}}},
    },
}  # fmt: skip


def _read_examples() -> dict[str, Values]:
    folder = REPOSITORY / "examples"
    files = sorted([*folder.glob("qwen3-14b-sft/*.yaml"), *folder.glob("models/*.yaml")])
    read = {str(path.relative_to(folder)): yaml.safe_load(path.read_text()) for path in files}
    return {name: values for name, values in read.items() if "apiVersion" not in values}


_READ = _read_examples()
# Every values file of examples/, by its path there: those of trainings, and those of servers.
EXAMPLES = {name: values for name, values in _READ.items() if not (values.get("serve") or {}).get("enabled")}
SERVERS = {name: values for name, values in _READ.items() if name not in EXAMPLES}
MATRIX |= EXAMPLES


def read_run(values: Values, folder: Path) -> TrainConfig:
    """Return the settings that `run` arrives as in the pods; the file is written to `folder`."""
    path = folder / "run.yaml"
    path.write_text(render_files(values)["run.yaml"])
    return load_settings(TrainConfig, path, {}, {})

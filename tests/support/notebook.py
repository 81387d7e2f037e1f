"""A cluster's namespace as a notebook sees it through kubectl and helm, on this machine.

Real Helm renders, a release runs in a StagedCluster, a pod is a staged one. Only what the example's notebook says is
understood. No hub can be reached: the job that fetches weights finds them fetched.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Listener
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import yaml

from support.helm import Manifest, container_of, helm, rayjob_of, read_manifests
from support.kuberay import find_core_errors
from support.staged_cluster import TIMEOUT_S, StagedCluster
from support.staged_pods import Mount, Pod, PodNetwork

NAMESPACE = "training"
_PACKAGES = "/opt/packages"
_COMMAND = Path(__file__).with_name("stand_in_command.py")


class RefusedError(Exception):
    """What a command complains of."""


@dataclass
class Job:
    """A job with its status and log; `running` ends what it runs on."""

    status: dict[str, Any]
    log: str
    cluster: StagedCluster | None = None
    running: ExitStack = field(default_factory=ExitStack)

    def update(self) -> None:
        """Read the status; end the cluster with the job, as `ttlSecondsAfterFinished` has KubeRay do."""
        if self.cluster is None:
            return
        self.status, self.log = self.cluster.status(), self.cluster.logs()
        if self.status["jobDeploymentStatus"] in ("Complete", "Failed"):
            self.cluster = None
            self.running.close()


class StagedNamespace:
    """Claims, which are folders by name, pods and jobs.

    `environ` and `packages`, a folder of Python's, belong to the pods' image; `fetched` is the log of fetch-weights.
    """

    def __init__(
        self,
        folder: Path,
        claims: Mapping[str, Path],
        environ: Mapping[str, str],
        packages: Path,
        fetched: str,
    ) -> None:
        self._folder = folder
        self._claims = dict(claims)
        self._environ = {**environ, "PYTHONPATH": _PACKAGES}
        self._packages = Mount(packages, _PACKAGES, read_only=True)
        self._fetched = fetched
        self._jobs: dict[str, Job] = {}
        self._pods: dict[str, tuple[Manifest, Pod]] = {}

    def __enter__(self) -> StagedNamespace:
        self._network = PodNetwork()
        return self

    def __exit__(self, *_: object) -> None:
        self._delete([*(f"pod/{name}" for name in self._pods), *(f"job/{name}" for name in self._jobs)])
        self._network.close()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left but the claims."""
        return not self._jobs and not self._pods

    def answer(self, words: Sequence[str], given: str, folder: str) -> Any:
        """Return what the command prints, run in `folder` and given a text; of port-forward a process of the pod, and the port.

        Raises:
            RefusedError: it fails, or is none of the notebook's.
        """
        match words:
            case ["helm", "install", release, *flags]:
                return self._install(release, flags, folder)
            case ["helm", "uninstall", *releases, "--namespace=training", "--ignore-not-found"]:
                self._delete([f"job/rayjob-{release}" for release in releases])
                return "".join(f'release "{release}" uninstalled\n' for release in releases)
            case ["kubectl", "--namespace=training", *rest]:
                return self._answer_kubectl(rest, given)
        raise RefusedError(f"there is no stand-in for `{shlex.join(words)}`")

    def _answer_kubectl(self, words: Sequence[str], given: str) -> Any:
        match words:
            case ["get", "pvc", *claims, output]:
                return self._list_claims(claims, output)
            case ["apply", "--filename=-"]:
                return "".join(map(self._apply, yaml.safe_load_all(given)))
            case ["wait", resource, "--for=condition=Ready", _]:
                return self._wait_until_ready(resource)
            case ["get", resource, "--output=json"]:
                job = self._find_job(resource)
                job.update()
                return json.dumps({"status": job.status})
            case ["logs", resource, tail]:
                lines = self._find_job(resource).log.splitlines(keepends=True)
                return "".join(lines[-int(tail.removeprefix("--tail=")) :])
            case ["exec", pod, "--", *command]:
                return self._execute(pod, command)
            case ["port-forward", resource, port]:
                _, pod = self._find_pod(resource)
                return _first_process(pod), int(port.removeprefix(":"))
            case ["delete", *resources, "--ignore-not-found"]:
                self._delete(resources)
                return "".join(f"{resource} deleted\n" for resource in resources)
        raise RefusedError(f"there is no stand-in for `kubectl {shlex.join(words)}`")

    def _install(self, release: str, flags: Sequence[str], folder: str) -> str:
        words = [helm(), "install", release, *flags, "--dry-run=client", "--output=json"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise RefusedError(done.stderr)
        rendered = json.loads(done.stdout)
        manifests = read_manifests(rendered["manifest"])
        name = rayjob_of(manifests)["metadata"]["name"]
        if name in self._jobs:
            raise RefusedError(f"cannot re-use a name that is still in use: {release}")
        job = self._jobs[name] = Job({}, "")
        job.cluster = job.running.enter_context(
            StagedCluster(manifests, self._folder / release, self._claims)
        )
        job.cluster.submit()
        return (
            f"NAME: {release}\nNAMESPACE: {NAMESPACE}\nSTATUS: deployed\nNOTES:\n{rendered['info']['notes']}"
        )

    def _apply(self, manifest: Manifest) -> str:
        if errors := find_core_errors(manifest):
            raise RefusedError("\n".join(errors))
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind == "Job":
            assert name == "fetch-weights"
            self._jobs[name] = Job({"conditions": [{"type": "Complete", "status": "True"}]}, self._fetched)
            return f"job.batch/{name} created\n"
        container = container_of(manifest)
        environ = {entry["name"]: entry["value"] for entry in container.get("env", [])}
        mounts = [self._packages, *_stage_claims(manifest["spec"], self._claims)]
        command = f"echo started && exec {shlex.join(container['command'])}"
        pod = self._network.start(name, self._folder / name, command, {**self._environ, **environ}, mounts)
        self._pods[name] = manifest, pod
        return f"pod/{name} created\n"

    def _list_claims(self, claims: Sequence[str], output: str) -> str:
        if absent := set(claims) - set(self._claims):
            raise RefusedError(f"persistentvolumeclaims {absent} not found")
        assert output == "--output=custom-columns=CLAIM:.metadata.name,STATUS:.status.phase"
        return "CLAIM    STATUS\n" + "".join(f"{claim:<9}Bound\n" for claim in claims)

    def _wait_until_ready(self, resource: str) -> str:
        manifest, pod = self._find_pod(resource)
        probe = container_of(manifest).get("readinessProbe", {}).get("httpGet")
        url = f"http://{pod.address}:{probe['port']}{probe['path']}" if probe else None
        deadline = time.monotonic() + TIMEOUT_S
        while pod.process.poll() is None and time.monotonic() < deadline:
            if "started" in pod.log.read_text() and (url is None or self._network.get(url) is not None):
                return f"{resource} condition met\n"
            time.sleep(0.2)
        raise RefusedError(f"timed out waiting for the condition on {resource}\n{pod.log.read_text()}")

    def _execute(self, name: str, command: Sequence[str]) -> bytes:
        _, pod = self._find_pod(f"pod/{name}")
        inside = ["nsenter", f"--target={_first_process(pod)}", "--mount", "--pid", "--root", "--wd"]
        done = subprocess.run([*inside, *command], capture_output=True)
        if done.returncode != 0:
            raise RefusedError(f"{done.stderr.decode()}command terminated with exit code {done.returncode}")
        return done.stdout

    def _delete(self, resources: Sequence[str]) -> None:
        for resource in resources:
            name = resource.partition("/")[2]
            if job := self._jobs.pop(name, None):
                job.running.close()
            if held := self._pods.pop(name, None):
                held[1].kill()

    def _find_job(self, resource: str) -> Job:
        job = self._jobs.get(resource.partition("/")[2])
        if job is None:
            raise RefusedError(f"{resource} not found")
        return job

    def _find_pod(self, resource: str) -> tuple[Manifest, Pod]:
        held = self._pods.get(resource.partition("/")[2])
        if held is None or held[1].process.poll() is not None:
            raise RefusedError(f"{resource} not found, or it has ended")
        return held


def _first_process(pod: Pod) -> int:
    return int(psutil.Process(pod.process.pid).children()[0].pid)


def _stage_claims(spec: Manifest, claims: Mapping[str, Path]) -> list[Mount]:
    """Return the pod's mounts of claims; /dev/shm and /tmp every staged pod has of its own."""
    names = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    return [
        Mount(claims[names[mount["name"]]], mount["mountPath"], mount.get("readOnly", False))
        for mount in spec["containers"][0]["volumeMounts"]
        if mount["name"] in names
    ]


@contextmanager
def serve(namespace: StagedNamespace, folder: Path) -> Iterator[dict[str, str]]:
    """Answer kubectl and helm as long as this is open; give the environment in which they are found."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    for name in ("kubectl", "helm"):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{_COMMAND}" {name} "$@"\n')
        (commands / name).chmod(0o755)
    address = str(folder / "socket")
    with Listener(address) as listener:
        # One thread for all: what a pod is started by must live as long as the pod.
        thread = Thread(target=_answer_all, args=(listener, namespace))
        thread.start()
        try:
            yield {"PATH": f"{commands}:{os.environ['PATH']}", "STAGED_NAMESPACE": address}
        finally:
            with Client(address) as connection:
                connection.send(None)
            thread.join()


def _answer_all(listener: Listener, namespace: StagedNamespace) -> None:
    with namespace:
        while True:
            with listener.accept() as connection:
                request = connection.recv()
                if request is None:
                    return
                try:
                    connection.send((namespace.answer(*request), ""))
                except (RefusedError, AssertionError) as error:
                    connection.send((None, str(error)))

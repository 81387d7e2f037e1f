"""A rendered RayJob, run on this machine as KubeRay would run it."""

from __future__ import annotations

import json
import math
import re
import time
from base64 import b64decode
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from support.helm import Manifest, container_of, pods_of, rayjob_of
from support.staged_pods import Mount, Pod, PodNetwork, skip_without_namespaces

TIMEOUT_S = 240
_UNITS = {"": 1.0, "m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


class StagedCluster:
    """The pods of a RayJob: `with StagedCluster(render(values), folder, {"pv-efs": shared}) as cluster`.

    Inside, the head and the workers are ready: `submit`, then `wait`. It does what KubeRay 1.7 does in K8sJobMode
    (its pod.go, job.go and rayjob_controller.go). `claims` are the folders of the claims, by name; `folder`
    gets the pods' logs.
    """

    def __init__(self, manifests: list[Manifest], folder: Path, claims: dict[str, Path]) -> None:
        self._job = rayjob_of(manifests)
        self._workers_spec = self._job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        self._config_maps = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "ConfigMap"}
        self._folder = folder
        self._claims = claims
        self._numbers = count(1)
        self._stack = ExitStack()
        self._job_status = ""
        self._submitter: Pod | None = None
        self.workers: list[Pod] = []
        metadata = self._job["metadata"]
        self.name = f"{metadata['name']}-a1b2c"
        self._service = f"{self.name}-head-svc.{metadata['namespace']}.svc.cluster.local"

    def __enter__(self) -> StagedCluster:
        skip_without_namespaces()
        try:
            self._start_head_and_workers()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start_head_and_workers(self) -> None:
        self._network = PodNetwork()
        self._stack.callback(self._network.close)
        head = self._job["spec"]["rayClusterSpec"]["headGroupSpec"]
        command = _ray_start("head", head["rayStartParams"], head["template"])
        environ = {**self._environ("headgroup", command), "RAY_ADDRESS": "127.0.0.1:6379"}
        self.head = self._start("head", f"{self.name}-head", command, environ, self._service)
        self._wait_until_ready(self.head, ":8265/api/gcs_healthz")
        for _ in range(self._workers_spec["replicas"]):
            self.add_worker()
        for pod in [self.head, *self.workers]:
            self._wait_until_ready(pod, ":52365/api/local_raylet_healthz")

    def add_worker(self) -> None:
        """Start another worker pod; it joins the cluster some seconds later."""
        group = self._workers_spec
        name = group["groupName"]
        parameters = {"address": f"{self._service}:6379", **group["rayStartParams"]}
        command = _ray_start("worker", parameters, group["template"])
        environ = {
            **self._environ(name, command),
            "RAY_ADDRESS": f"{self._service}:6379",
            "FQ_RAY_IP": self._service,
            "RAY_IP": self._service.split(".")[0],
        }
        pod_name = f"{self.name}-{name}-worker-{next(self._numbers)}"
        self.workers.append(self._start("worker", pod_name, command, environ))

    def kill_worker(self, number: int) -> None:
        """End a worker pod without notice, as a lost machine would."""
        self.workers.pop(number).kill()

    def submit(self) -> None:
        """Start the pod that submits the job and follows its log."""
        address = f"{self._service}:8265"
        environ = {
            "PYTHONUNBUFFERED": "1",
            "RAY_DASHBOARD_ADDRESS": address,
            "RAY_JOB_SUBMISSION_ID": self.name,
        }
        command = _submit_command(self._job["spec"], f"http://{address}", self.name)
        self._submitter = self._start("submitter", f"{self.name}-submitter", command, environ)

    def status(self) -> dict[str, str]:
        """Return what the RayJob's status would say: `jobStatus` and `jobDeploymentStatus`."""
        if self._submitter is None:
            return {"jobStatus": "", "jobDeploymentStatus": "Initializing"}
        submitter_has_ended = self._submitter.process.poll() is not None
        answer = self._network.get(f"http://{self.head.address}:8265/api/jobs/{self.name}")
        if answer is not None:
            self._job_status = json.loads(answer)["status"]
        deployment = "Running"
        if submitter_has_ended and self._job_status in ("", "FAILED"):
            deployment = "Failed"
        elif submitter_has_ended and self._job_status in ("SUCCEEDED", "STOPPED"):
            deployment = "Complete"
        return {"jobStatus": self._job_status, "jobDeploymentStatus": deployment}

    def wait(self) -> str:
        """Return `jobStatus` once the job has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while (status := self.status())["jobDeploymentStatus"] == "Running":
            assert time.monotonic() < deadline, f"still running after {TIMEOUT_S} s:\n{self.logs()}"
            time.sleep(1)
        return status["jobStatus"]

    def logs(self) -> str:
        """Return the job's log, as the submitter's pod shows it."""
        return self._submitter.log.read_text() if self._submitter else ""

    def _start(
        self, component: str, name: str, command: str, environ: dict[str, str], service: str | None = None
    ) -> Pod:
        folder = self._folder / name
        template = pods_of(self._job)[component]
        # What the image sets, what KubeRay adds, what the chart says.
        environ = {"RAY_USAGE_STATS_ENABLED": "0", **environ, **_read_environ(template)}
        mounts = self._stage_volumes(template, folder / "volumes")
        pod = self._network.start(name, folder, command, environ, mounts, service)
        self._stack.callback(pod.kill)
        return pod

    def _environ(self, group: str, command: str) -> dict[str, str]:
        """Return the environment that KubeRay gives the head and the workers alike."""
        return {
            "RAY_CLUSTER_NAME": self.name,
            "RAY_NODE_TYPE_NAME": group,
            "KUBERAY_GEN_RAY_START_CMD": command,
            "RAY_PORT": "6379",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
        }

    def _stage_volumes(self, template: Manifest, folder: Path) -> list[Mount]:
        """Return the pod's mounts, of folders that its volumes have become."""
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = []
        for mount in container_of(template)["volumeMounts"]:
            volume = volumes[mount["name"]]
            source = folder / volume["name"]
            if "configMap" in volume:
                _write_config_map(source, self._config_maps[volume["configMap"]["name"]], volume["configMap"])
            elif "persistentVolumeClaim" in volume:
                source = self._claims[volume["persistentVolumeClaim"]["claimName"]]
            else:
                assert {"emptyDir", "ephemeral"} & set(volume), f"{volume} can't be staged"
                source.mkdir(parents=True)
            mounts.append(Mount(source, mount["mountPath"], mount.get("readOnly", False)))
        return mounts

    def _wait_until_ready(self, pod: Pod, path: str) -> None:
        """Wait for what KubeRay's readiness probe asks."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._network.get(f"http://{pod.address}{path}") is None:
            assert pod.process.poll() is None, f"{pod.name} has ended:\n{pod.log.read_text()}"
            assert time.monotonic() < deadline, f"{pod.name} isn't ready:\n{pod.log.read_text()}"
            time.sleep(0.5)


def _ray_start(component: str, parameters: dict[str, str], template: Manifest) -> str:
    """Return the `ray start` that KubeRay puts together from a group's parameters and its container's limits."""
    limits = container_of(template)["resources"]["limits"]
    gpus = next((limits[name] for name in limits if name.endswith("gpu")), None)
    wanted = {"num-cpus": limits.get("cpu"), "num-gpus": gpus, "memory": limits.get("memory")}
    defaults = {name: str(_read_quantity(text)) for name, text in wanted.items() if text}
    if component == "head":
        defaults["dashboard-host"] = "0.0.0.0"
    fixed = {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365", "block": "true"}
    given = {**defaults, **fixed, **parameters}
    flags = [f"--{name}" if given[name] == "true" else f"--{name}={given[name]}" for name in sorted(given)]
    return " ".join(["ulimit -n 65536; ray start", *(["--head"] if component == "head" else []), *flags])


def _submit_command(spec: Manifest, address: str, job: str) -> str:
    runtime_env = ""
    if text := spec.get("runtimeEnvYAML"):
        runtime_env = f"--runtime-env-json {json.dumps(json.dumps(yaml.safe_load(text)))}"
    return (
        f"set -e; if ! ray job status --address {address} {job} >/dev/null 2>&1 ; then "
        f"ray job submit --address {address} --no-wait {runtime_env} --submission-id {job} -- {spec['entrypoint']} ; "
        f"fi ; ray job logs --address {address} --follow {job}"
    )


def _read_environ(template: Manifest) -> dict[str, str]:
    """Return the container's environment, its `$(NAME)` replaced; variables from elsewhere aren't there."""
    environ: dict[str, str] = {}
    for entry in container_of(template)["env"]:
        if "value" in entry:
            replace = lambda found: "$" if found[0] == "$$" else environ.get(found[1], found[0])  # noqa: E731
            environ[entry["name"]] = re.sub(r"\$\$|\$\(([^)]+)\)", replace, entry["value"])
    return environ


def _read_quantity(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", text).groups()  # type: ignore[union-attr]
    return math.ceil(float(number) * _UNITS[unit])


def _write_config_map(folder: Path, config_map: Manifest, volume: dict[str, Any]) -> None:
    """Write a ConfigMap as the kubelet does: its files in a dated folder, and links to them."""
    data = {key: text.encode() for key, text in config_map.get("data", {}).items()}
    data |= {key: b64decode(text) for key, text in config_map.get("binaryData", {}).items()}
    items = volume.get("items") or [{"key": key, "path": key} for key in data]
    dated = folder / "..2026_11_22_10_00_00.123456789"
    for item in items:
        path = dated / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[item["key"]])
        path.chmod(volume["defaultMode"])
    (folder / "..data").symlink_to(dated.name)
    for name in {item["path"].split("/")[0] for item in items}:
        (folder / name).symlink_to(f"..data/{name}")

"""The chart: what it renders is valid, and is what the values say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from support.helm import (
    CHART,
    Values,
    container_of,
    notes_of,
    pods_of,
    render,
    render_files,
    render_job,
    run_helm,
)
from support.kuberay import (
    find_core_errors,
    find_crd_errors,
    find_kuberay_errors,
    find_pod_errors,
    skip_without_crd,
)
from support.values import FINE_TUNE, MATRIX


def test_lint_finds_nothing() -> None:
    done = run_helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", MATRIX)
def test_every_object_is_valid(case: str) -> None:
    manifests = render(MATRIX[case])
    for manifest in manifests:
        assert manifest["metadata"]["namespace"] == "team"
        if manifest["kind"] == "RayJob":
            assert find_kuberay_errors(manifest) == []
            assert find_pod_errors(manifest) == []
        else:
            assert find_core_errors(manifest) == []


@pytest.mark.parametrize("case", MATRIX)
def test_every_job_agrees_with_the_crd(case: str) -> None:
    skip_without_crd()
    assert find_crd_errors(render_job(MATRIX[case])) == []


def test_the_crd_check_sees_an_unknown_field() -> None:
    skip_without_crd()
    job = render_job({})
    container_of(pods_of(job)["head"])["env"][0]["valu"] = "x"
    job["spec"]["backoffLimit"] = "3"
    assert len(find_crd_errors(job)) == 2


@pytest.mark.parametrize(
    "release", ["a", "7", "true", "a.b", "x" * 40, "x" * 41, "y" * 53, f"{'z' * 37}.{'z' * 9}"]
)
def test_every_release_has_a_valid_name_of_its_own(release: str) -> None:
    job = render_job({}, release)
    assert find_kuberay_errors(job) == []
    assert job["metadata"]["labels"]["app.kubernetes.io/instance"] == release
    name = job["metadata"]["name"]
    assert (name == f"rayjob-{release}") == (len(release) <= 40 and "." not in release)
    other = release[:-1] + ("b" if release[-1] != "b" else "c")
    assert render_job({}, other)["metadata"]["name"] != name


def test_scripts_of_the_framework_are_mounted_read_only_on_head_and_workers() -> None:
    manifests = render(FINE_TUNE)
    scripts = next(m["data"] for m in manifests if m["metadata"]["name"] == "rayjob-my-run-scripts")
    assert scripts == {path.name: path.read_text() for path in (CHART / "scripts" / "ray_train").glob("*.py")}
    pods = pods_of(manifests[-1])
    for component in ("head", "worker"):
        mounts = {m["mountPath"]: m for m in container_of(pods[component])["volumeMounts"]}
        assert mounts["/etc/framework-scripts"]["readOnly"]
        assert {"/fsx", "/efs", "/tmp", "/etc/tunesmith"} <= set(mounts)


def test_only_the_workers_get_gpus_their_nodes_and_their_tolerations() -> None:
    pods = pods_of(render_job(FINE_TUNE))
    worker = pods["worker"]["spec"]
    assert container_of(pods["worker"])["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert worker["nodeSelector"] == {"node.kubernetes.io/instance-type": "p4d.24xlarge"}
    assert worker["tolerations"] == FINE_TUNE["tolerations"]
    for component in ("head", "submitter"):
        assert "gpu" not in json.dumps(pods[component])
        assert not {"nodeSelector", "tolerations"} & set(pods[component]["spec"])


def test_ports_and_resources_of_the_head_are_as_given() -> None:
    head = container_of(pods_of(render_job(FINE_TUNE))["head"])
    assert [(port["name"], port["containerPort"]) for port in head["ports"]] == [
        ("gcs-server", 6379),
        ("client", 10001),
        ("dashboard", 8265),
    ]
    assert head["resources"] == {
        "requests": {"cpu": "300m", "memory": "8Gi"},
        "limits": {"cpu": "2", "memory": "16Gi"},
    }


def test_a_tolerations_value_is_kept() -> None:
    pods = pods_of(render_job(MATRIX["tolerations"]))
    assert pods["worker"]["spec"]["tolerations"][0]["value"] == "true"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"runtimeEnvYAML": "pip:\n  - a==1.0\n"}, {"pip": ["a==1.0"]}),
        ("pip: [a==1.0]", {"pip": ["a==1.0"]}),
        ({"pip": ["a==1.0"], "env_vars": {"A": "1e3"}}, {"pip": ["a==1.0"], "env_vars": {"A": "1e3"}}),
    ],
)
def test_the_runtime_environment_has_three_shapes(given: Any, read: dict[str, Any]) -> None:
    assert yaml.safe_load(render_job({"ray": {"runtime_env_yaml": given}})["spec"]["runtimeEnvYAML"]) == read


ODD_TEXTS = [
    "",
    "a: b # c",
    "'\"\\",
    "line\nline\n",
    "  x ",
    "0x1F",
    "1e3",
    "null",
    "~",
    "é\x01 \\u2028",
    "$(A) $$ `b`",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_values_of_env_arrive_as_written_on_every_pod(text: str) -> None:
    job = render_job({"train": {"env": [{"name": "A", "value": text}]}})
    for pod in pods_of(job).values():
        assert {"name": "A", "value": text} in container_of(pod)["env"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (1000000, "1000000"), (-5, "-5"), (0.5, "0.5"), (5e-5, "0.00005"), (True, "true"), (None, "")],
)
def test_numbers_of_env_and_args_keep_their_form(value: Any, text: str) -> None:
    job = render_job({"train": {"env": [{"name": "A", "value": value}]}})
    assert {"name": "A", "value": text} in container_of(pods_of(job)["head"])["env"]
    if value is not None:
        assert render_files({"train": {"command": ["echo"], "args": [value]}})["train.sh"] == f"echo {text}"


def test_env_is_templated_and_nothing_else_is() -> None:
    values: Values = {
        "train": {
            "env": [{"name": "A", "value": "{{ .Release.Name }}"}],
            "command": "echo {{ .Release.Name }}",
        },
        "pre_script": ["{{ fail `no` }}"],
        "run": {"input_template": "{{ .Release.Name }}"},
    }
    assert {"name": "A", "value": "my-run"} in container_of(pods_of(render_job(values))["head"])["env"]
    files = render_files(values)
    assert files["train.sh"] == "echo {{ .Release.Name }}"
    assert files["pre_script.sh"] == "{{ fail `no` }}"
    assert yaml.safe_load(files["run.yaml"]) == values["run"]


def test_values_from_secrets_pass() -> None:
    source = {"secretKeyRef": {"name": "hub", "key": "token"}}
    job = render_job({"train": {"env": [{"name": "HF_TOKEN", "valueFrom": source}]}})
    assert {"name": "HF_TOKEN", "valueFrom": source} in container_of(pods_of(job)["worker"])["env"]
    assert find_pod_errors(job) == []


def test_home_lies_on_the_last_claim_unless_it_is_given() -> None:
    home = lambda values: container_of(pods_of(render_job(values))["head"])["env"][0]  # noqa: E731
    assert home({}) == {"name": "HOME", "value": "/efs/home/my-run"}
    assert home({"train": {"env": [{"name": "A", "value": "1"}]}})["value"] == "/efs/home/my-run"
    assert home({"train": {"env": [{"name": "HOME", "value": "/x"}]}})["value"] == "/x"
    assert home({"pvc": [{"name": "fsx", "mount_path": "/fsx/"}]})["value"] == "/fsx/home/my-run"


def test_of_two_variables_of_one_name_the_later_counts() -> None:
    env = [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}, {"name": "A", "value": "3"}]
    job = render_job({"pvc": [], "train": {"env": env}})
    assert container_of(pods_of(job)["head"])["env"][:2] == env[1:]


@pytest.mark.parametrize(
    ("env", "value"), [([], "600"), ([{"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "30"}], "30")]
)
def test_a_stopped_job_has_time_to_save(env: list[dict[str, str]], value: str) -> None:
    found = container_of(pods_of(render_job({"train": {"env": env}}))["head"])["env"]
    assert [e["value"] for e in found if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S"] == [value]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"train": {"command": ["python", "a.py"], "args": ["--b=1", "2>&1 | tee $LOG"]}}, "python a.py --b=1 2>&1 | tee $LOG"),
        ({}, 'python -m tunesmith train /etc/tunesmith/run.yaml --home="$HOME"'),
        ({"run": {"home": "/x"}}, "python -m tunesmith train /etc/tunesmith/run.yaml"),
        ({"train": {"args": ["--max_steps=1"]}}, 'python -m tunesmith train /etc/tunesmith/run.yaml --home="$HOME" --max_steps=1'),
        ({"pre_script": ["echo"]}, ""),
    ],
)  # fmt: skip
def test_the_training_is_the_command_or_the_run(values: Values, text: str) -> None:
    assert render_files(values)["train.sh"] == text


def test_restricted_pods_run_as_a_plain_user() -> None:
    for pod in pods_of(render_job(MATRIX["restricted"])).values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000
    for case in ("nothing", "restricted"):
        for pod in pods_of(render_job(MATRIX[case])).values():
            assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            security = container_of(pod)["securityContext"]
            assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert "hostPath" not in json.dumps(pod)


def test_elastic_workers_are_scaled_by_ray() -> None:
    cluster = render_job(MATRIX["elastic"])["spec"]["rayClusterSpec"]
    group = cluster["workerGroupSpecs"][0]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 2, 4)


def test_elastic_pods_know_that_they_are_and_others_do_not() -> None:
    told = {"name": "RAYTRAIN_ELASTIC", "value": "1"}
    assert told in container_of(pods_of(render_job(MATRIX["elastic"]))["head"])["env"]
    assert "RAYTRAIN_ELASTIC" not in json.dumps(render_job({}))


def test_the_autoscaler_is_as_restricted_as_the_other_containers() -> None:
    job = render_job({**MATRIX["elastic"], "podSecurity": "restricted"})
    security = job["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"]
    assert security == container_of(pods_of(job)["head"])["securityContext"]


@pytest.mark.parametrize(("nnodes", "refused"), [(1, False), (2, False), (4, False), (5, True), (0, True)])
def test_bounds_hold_for_numbers_of_files_and_of_the_command_line(nnodes: int, refused: bool) -> None:
    numbers = {"resources.nnodes": nnodes, "elastic.min_nodes": 1, "elastic.max_nodes": 4}
    for assigned in numbers:
        values: dict[str, dict[str, int]] = {"resources": {}, "elastic": {}}
        for name, number in numbers.items():
            if name != assigned:
                group, key = name.split(".")
                values[group][key] = number
        words = ["my-run", str(CHART), "-f", "-", "--set", f"{assigned}={numbers[assigned]}"]
        done = run_helm("template", *words, values=values)
        assert (done.returncode != 0) == refused, done.stderr
        assert "error calling" not in done.stderr


def test_efa_comes_with_huge_pages_in_requests_and_limits() -> None:
    resources = container_of(pods_of(render_job(MATRIX["efa"]))["worker"])["resources"]
    for kind in ("requests", "limits"):
        assert resources[kind]["vpc.amazonaws.com/efa"] == "4"
        assert resources[kind]["hugepages-2Mi"] == "5120Mi"


def test_a_spot_worker_drains_within_its_grace_period() -> None:
    pod = pods_of(render_job(MATRIX["spot"]))["worker"]
    assert pod["spec"]["terminationGracePeriodSeconds"] == 120
    hook = container_of(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert hook == ["bash", "/etc/tunesmith/drain.sh", "120"]
    assert "drain.sh" in render_files(MATRIX["spot"])
    assert "drain.sh" not in render_files({})


def test_pods_are_patched_as_kubernetes_patches() -> None:
    pods = pods_of(render_job(MATRIX["patched pods"]))
    plain = pods_of(render_job({}))
    assert pods["head"]["spec"] == {
        **plain["head"]["spec"],
        "nodeSelector": {"pool": "cpu"},
        "priorityClassName": "high",
    }
    worker = pods["worker"]["spec"]
    assert [container["name"] for container in worker["containers"]] == ["ray-worker", "side"]
    assert worker["containers"][0]["env"] == [
        *container_of(plain["worker"])["env"],
        {"name": "A", "value": "1"},
    ]
    assert worker["containers"][0]["volumeMounts"] == container_of(plain["worker"])["volumeMounts"]
    assert [volume["name"] for volume in worker["volumes"]][-1] == "cache"
    assert "fsGroup" not in worker["securityContext"]
    assert worker["securityContext"]["supplementalGroups"] == [44]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "  /efs/home/my-run/results"),
        ({"run": {"home": "/fsx/a"}}, "  /fsx/a/results"),
        ({"run": {"home": "/fsx/a"}, "train": {"command": ["python"]}}, "  /efs/home/my-run/results"),
        ({"run": {"home": "/fsx2/a"}}, "The home /fsx2/a lies on no claim"),
        ({"train": {"env": [{"name": "HOME", "value": "/efs/../root"}]}}, "The home /efs/../root lies on no claim"),
        ({"pvc": []}, "The home lies on no claim"),
        ({"train": {"env": [{"name": "HOME", "value": "/efs/$(USER)"}]}}, "where HOME says"),
        ({"train": {"env": [{"name": "HOME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}}, "where HOME says"),
    ],
)  # fmt: skip
def test_notes_say_where_the_results_are(values: Values, said: str) -> None:
    assert said in notes_of(values)


def test_notes_name_what_the_release_is_made_of() -> None:
    notes = notes_of(FINE_TUNE)
    for said in (
        "kubectl logs -n team -f job/rayjob-my-run",
        "kubectl get rayjob -n team rayjob-my-run -o jsonpath='{.status.jobStatus}",
        "-head-svc",
        "/efs/home/my-run/results",
        "helm uninstall -n team my-run",
    ):
        assert said in notes

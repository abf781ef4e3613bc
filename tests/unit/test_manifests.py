"""launch/k8s and docker: manifests against their schemas, and that they agree with the image."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes.client
import pytest
import yaml
from kubeflow.training import models as kubeflow_models
from kubernetes.client import models as kubernetes_models

from rehearse_image import Instruction, read_dockerfile, script_of, steps_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
KINDS = {
    "job.yaml": {"Service": "V1Service", "Job": "V1Job"},
    "pytorchjob.yaml": {"PyTorchJob": "KubeflowOrgV1PyTorchJob"},
    "mpijob.yaml": {"MPIJob": "KubeflowOrgV1MPIJob"},
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch/k8s" / name).read_text()))


def model(name: str) -> Any:
    return getattr(kubeflow_models, name, None) or getattr(kubernetes_models, name, None)


def faults(kind: str, value: Any, where: str) -> Iterator[str]:
    """What of `value` is not as the published API description of `kind` says.

    The clients' own deserialization drops keys that it does not know; this names them.
    """
    if kind.startswith("list["):
        if not isinstance(value, list):
            yield f"{where}: {value!r} is not a list"
            return
        for index, item in enumerate(value):
            yield from faults(kind[5:-1], item, f"{where}[{index}]")
    elif kind.startswith("dict("):
        for key, item in value.items():
            yield from faults(kind.partition(", ")[2][:-1], item, f"{where}.{key}")
    elif model(kind) is not None:
        yield from _object_faults(kind, value, where)
    else:
        plain = {"str": str, "int": int, "bool": bool, "object": object, "float": float}
        expected = plain.get(kind, object)
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            yield f"{where}: {value!r} is not {kind}"


def _object_faults(kind: str, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is not a {kind}"
        return
    described = model(kind)
    by_json_name = {name: key for key, name in described.attribute_map.items()}
    for name in value.keys() - by_json_name.keys():
        yield f"{where}.{name}: {kind} has no such field"
    given = {by_json_name[name]: item for name, item in value.items() if name in by_json_name}
    try:
        configuration = kubernetes.client.Configuration()
        described(**given, local_vars_configuration=configuration)
    except ValueError as error:  # a required field, an enumeration
        yield f"{where}: {error}"
    for key, item in given.items():
        name = described.attribute_map[key]
        yield from faults(described.openapi_types[key], item, f"{where}.{name}")


def pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of a document, with the name of its replicas."""
    spec = document.get("spec", {})
    if "template" in spec:
        yield "", spec["template"]["spec"]
    for key in ("pytorchReplicaSpecs", "mpiReplicaSpecs"):
        for name, replica in spec.get(key, {}).items():
            yield name, replica["template"]["spec"]


@pytest.mark.parametrize("name", KINDS)
def test_kubernetes_manifests_follow_their_schemas(name: str) -> None:
    found = documents(name)
    assert [document["kind"] for document in found] == list(KINDS[name])
    for document in found:
        kind = KINDS[name][document["kind"]]
        assert list(faults(kind, document, document["kind"])) == []


def test_the_check_of_manifests_finds_mistakes() -> None:
    document = documents("job.yaml")[1]
    document["spec"]["completion"] = 3
    document["spec"]["parallelism"] = "2"
    container = document["spec"]["template"]["spec"]["containers"][0]
    del container["name"]
    container["env"][0]["valeu"] = "2"
    words = "\n".join(faults("V1Job", document, "Job"))
    assert "Job.spec.completion: V1JobSpec has no such field" in words
    assert "Job.spec.parallelism: '2' is not int" in words
    assert "containers[0]: Invalid value for `name`, must not be `None`" in words
    assert "containers[0].env[0].valeu: V1EnvVar has no such field" in words
    replicas = {"PyTorchJob": documents("pytorchjob.yaml")[0]}["PyTorchJob"]
    replicas["spec"]["pytorchReplicaSpecs"]["Worker"]["replica"] = 1
    assert "Worker.replica" in "\n".join(faults("KubeflowOrgV1PyTorchJob", replicas, "PyTorchJob"))


@pytest.mark.parametrize("name", KINDS)
def test_pods_are_unprivileged_and_have_what_a_run_needs(name: str) -> None:
    seen = 0
    for document in documents(name):
        for role, pod in pods(document):
            seen += 1
            assert pod["securityContext"]["runAsUser"] == 10001
            assert pod["terminationGracePeriodSeconds"] == 300
            if role == "Launcher":
                continue  # holds no GPU and writes nothing
            assert pod["automountServiceAccountToken"] is False
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
                mounts = {each["mountPath"] for each in container["volumeMounts"]}
                assert mounts == {"/home/bitscale/runs", "/dev/shm"}
    assert seen


def test_the_job_says_its_number_of_nodes_and_their_head_alike() -> None:
    service, job = documents("job.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["NUM_NODES"] == str(job["spec"]["completions"])
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    head = f"{job['metadata']['name']}-0.{service['metadata']['name']}:29500"
    assert environment["HEAD"] == head
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    script, ranks = container["command"][:2]
    assert (ROOT / script).is_file()
    assert ranks == container["resources"]["limits"]["nvidia.com/gpu"]


def test_compose_file_follows_the_compose_specification(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    text = (ROOT / "docker/compose.yaml").read_text()
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(text.replace("shm_size:", "shm_sizes:"))
    for path, code in ((ROOT / "docker/compose.yaml", 0), (wrong, 1)):
        done = subprocess.run([*check, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr


def test_compose_nodes_publish_no_port_and_use_the_image() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    instructions = read_dockerfile((ROOT / "docker/Dockerfile").read_text())
    stages = {i.value.partition(" AS ")[2] for i in instructions if i.name == "FROM"}
    copied = " ".join(i.value for i in instructions if i.name == "COPY")
    assert set(compose["services"]) == {"keys", "node1", "node2"}
    for service in compose["services"].values():
        assert "ports" not in service
        assert "privileged" not in service
        assert service["build"]["target"] in stages
        for argument in service["entrypoint"]:
            if argument.startswith("/etc/bitscale/"):
                assert f"docker/{Path(argument).name}" in copied


def test_steps_follow_stages_arguments_and_users() -> None:
    text = (
        "ARG KIND=a\nFROM x:1 AS base-a\nRUN one \\\n  && two\n# no\n"
        "FROM y:1 AS base-b\nRUN other\n"
        "FROM base-${KIND}\nENV A=1 \\\n    B=$A\nUSER 7\nWORKDIR /w\nRUN three\n"
        'HEALTHCHECK --interval=1m CMD ["ok"]\nENTRYPOINT ["start"]\nCMD ["--help"]\n'
    )
    steps = steps_of(read_dockerfile(text), {"KIND": "a"})
    assert steps[:2] == [Instruction("ENV", "KIND=a"), Instruction("RUN", "one && two")]
    script = script_of(steps)
    assert "other" not in script
    assert "export A=1\nexport B=$A\n" in script
    assert "setpriv --reuid=7 --regid=7 --clear-groups sh -c three" in script
    assert script.endswith("sh -c 'start --help'\n")
    assert "other" in script_of(steps_of(read_dockerfile(text), {"KIND": "b"}))
    with pytest.raises(SystemExit, match="has no ARG KINDS"):
        steps_of(read_dockerfile(text), {"KINDS": "b"})

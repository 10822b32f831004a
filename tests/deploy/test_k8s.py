"""The Kubernetes manifests as `kubectl kustomize` renders them: valid, restricted, and every name in them means something."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reranker_worker.config import load_config, settings_table

if TYPE_CHECKING:
    from collections.abc import Iterator

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deploy" / "k8s"
EXAMPLE_HOST = ROOT / "deploy" / "example-host" / "example_host.py"
KUBERNETES = "1.32"
NAMES = ["base", *(f"overlays/{path.name}" for path in sorted((K8S / "overlays").iterdir()))]
# What every pod of a StatefulSet may rely on from the images (deploy/docker/Dockerfile), not a setting of the worker.
OTHER_VARIABLES = {"HF_HUB_OFFLINE"}

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("kubectl") is None and shutil.which("kustomize") is None, reason="neither kubectl nor kustomize is installed"),
]
each = pytest.mark.parametrize("name", NAMES)
Document = dict[str, Any]


@cache
def rendered(name: str) -> str:
    """The manifests of the base or an overlay, as text."""
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    done = subprocess.run([*command, str(K8S / name)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def documents(name: str) -> list[Document]:
    """The same as data."""
    return [document for document in yaml.safe_load_all(rendered(name)) if document]


def of_kind(name: str, kind: str) -> dict[str, Document]:
    """Documents of one kind by their names."""
    return {document["metadata"]["name"]: document for document in documents(name) if document["kind"] == kind}


def pod_templates(name: str) -> Iterator[Document]:
    """The pod template of everything that runs pods."""
    for document in documents(name):
        if document["kind"] in ("StatefulSet", "Job", "Deployment", "DaemonSet"):
            yield document["spec"]["template"]


def containers(template: Document) -> list[Document]:
    """All containers of a pod."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


@each
def test_the_manifests_follow_the_schemas(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    file = tmp_path / "all.yaml"
    file.write_text(rendered(name))
    done = subprocess.run(
        [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", KUBERNETES, str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@each
def test_every_pod_keeps_the_restricted_pod_security_standard(name: str) -> None:
    for template in pod_templates(name):
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & {key for key, value in spec.items() if value}
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "downwardAPI", "csi", "ephemeral"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec.get("volumes", []))
        for container in containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, container["name"]
            assert context["readOnlyRootFilesystem"] is True, container["name"]
            assert context["capabilities"] == {"drop": ["ALL"]}, container["name"]
            assert not context.get("privileged")
            assert context.get("runAsUser", 10001) == 10001
            assert all("hostPort" not in port for port in container.get("ports", []))


@each
def test_every_container_asks_for_memory_and_has_a_limit_that_the_worker_fits_in(name: str) -> None:
    for template in pod_templates(name):
        for container in containers(template):
            resources = container["resources"]
            assert set(resources["limits"]) >= {"cpu", "memory"}, container["name"]
            assert set(resources["requests"]) >= {"cpu", "memory"}, container["name"]
            assert mebibytes(resources["requests"]["memory"]) <= mebibytes(resources["limits"]["memory"])
            if container["name"] == "host":
                assert mebibytes(resources["requests"]["memory"]) >= 213 + 66 + 30  # what was measured
            if container["name"] == "prewarm":
                assert mebibytes(resources["limits"]["memory"]) >= 1024


def mebibytes(quantity: str) -> int:
    """`320Mi` or `2Gi` as a number."""
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


@each
def test_every_reference_means_something_that_is_there(name: str) -> None:
    config_maps, claims = of_kind(name, "ConfigMap"), of_kind(name, "PersistentVolumeClaim")
    for template in pod_templates(name):
        for container in containers(template):
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert source["configMapRef"]["name"] in config_maps
                else:  # a Secret is made by hand, and only for gated models
                    assert source["secretRef"]["optional"] is True
        for volume in template["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
    for stateful in of_kind(name, "StatefulSet").values():
        assert stateful["spec"]["serviceName"] in of_kind(name, "Service")
        check_mounts(stateful["spec"]["template"], {claim["metadata"]["name"] for claim in stateful["spec"].get("volumeClaimTemplates", [])})
    for job in of_kind(name, "Job").values():
        check_mounts(job["spec"]["template"], set())


def check_mounts(template: Document, claims: set[str]) -> None:
    """Every mounted volume exists, and every volume is mounted."""
    volumes = {volume["name"] for volume in template["spec"].get("volumes", [])} | claims
    assert {mount["name"] for container in containers(template) for mount in container.get("volumeMounts", [])} == volumes


@each
def test_every_selector_chooses_the_pods_and_every_port_is_theirs(name: str) -> None:
    templates = list(pod_templates(name))
    for document in documents(name):
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            chosen = [template for template in templates if selects(spec["selector"], template)]
            named = {port["name"] for template in chosen for container in containers(template) for port in container.get("ports", [])}
            assert {port["targetPort"] for port in spec["ports"]} <= named
        elif document["kind"] in ("PodDisruptionBudget", "StatefulSet"):
            chosen = [template for template in templates if selects(spec["selector"]["matchLabels"], template)]
        elif document["kind"] == "NetworkPolicy":
            chosen = [template for template in templates if selects(spec["podSelector"]["matchLabels"], template)]
        else:
            continue
        assert len(chosen) == 1, f"{document['kind']} {document['metadata']['name']}"


def selects(labels: Document, template: Document) -> bool:
    """Whether a selector chooses a pod."""
    return labels.items() <= template["metadata"]["labels"].items()


@each
def test_every_pod_has_a_network_policy_and_a_serving_one_gets_out_only_to_download_in_its_own_pod(name: str) -> None:
    policies = of_kind(name, "NetworkPolicy").values()
    for template in pod_templates(name):
        (policy,) = (policy for policy in policies if selects(policy["spec"]["podSelector"]["matchLabels"], template))
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        downloads = any(container["name"] == "prewarm" for container in containers(template))
        allowed = {(port["port"], port["protocol"]) for rule in policy["spec"].get("egress") or [] for port in rule["ports"]}
        assert allowed == ({(53, "UDP"), (53, "TCP"), (443, "TCP")} if downloads else set())


@each
def test_every_variable_is_a_setting_of_the_worker_and_its_value_is_valid(name: str) -> None:
    known = {variable for _, variable, _, _ in settings_table()}
    given = {key: value for config_map in of_kind(name, "ConfigMap").values() for key, value in config_map["data"].items()}
    for template in pod_templates(name):
        for container in containers(template):
            direct = {item["name"]: item["value"] for item in container.get("env", [])}
            assert set(direct) - OTHER_VARIABLES <= known
            given |= direct
    assert set(given) - OTHER_VARIABLES <= known
    config = load_config([], given)
    assert config.request_timeout_ms < 5000


@each
def test_serving_reads_the_model_and_only_prewarming_writes_it(name: str) -> None:
    for template in pod_templates(name):
        for container in containers(template):
            for mount in container.get("volumeMounts", []):
                if mount["name"] == "model-cache":
                    assert mount.get("readOnly", False) is (container["name"] != "prewarm"), container["name"]
            if container["name"] == "host":
                switches = {item["name"]: item["value"] for item in container["env"]}
                assert switches == {"RERANKING_LOCAL_FILES_ONLY": "1", "HF_HUB_OFFLINE": "1"}


@each
def test_probes_ask_what_the_example_host_serves_and_give_it_time_to_answer(name: str) -> None:
    served = set(re.findall(r'self\.path == "(/[a-z]+)"', EXAMPLE_HOST.read_text()))
    (stateful,) = of_kind(name, "StatefulSet").values()
    (host,) = stateful["spec"]["template"]["spec"]["containers"]
    ports = {port["name"] for port in host["ports"]}
    for kind, path in {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}.items():
        probe = host[kind]
        assert probe["httpGet"] == {"path": path, "port": probe["httpGet"]["port"]}
        assert path in served
        assert probe["httpGet"]["port"] in ports
        # The host itself waits up to 5 s for the worker's answer to /readyz.
        assert probe["timeoutSeconds"] >= (6 if path == "/readyz" else 1)
    assert host["startupProbe"]["periodSeconds"] * host["startupProbe"]["failureThreshold"] >= 60  # RERANKING_START_TIMEOUT_MS


@each
def test_a_pod_has_time_to_drain(name: str) -> None:
    (stateful,) = of_kind(name, "StatefulSet").values()
    spec = stateful["spec"]["template"]["spec"]
    (pause,) = (int(item["lifecycle"]["preStop"]["exec"]["command"][1]) for item in spec["containers"])
    drain = float(re.search(r"^DRAIN_SECONDS = ([0-9.]+)", EXAMPLE_HOST.read_text(), re.MULTILINE)[1])  # type: ignore[index]
    (settings,) = of_kind(name, "ConfigMap").values()
    assert int(settings["data"]["RERANKING_DRAIN_TIMEOUT_MS"]) / 1e3 < drain
    assert pause + drain < spec["terminationGracePeriodSeconds"]


@each
def test_a_changed_setting_restarts_the_pods(name: str) -> None:
    (settings,) = of_kind(name, "ConfigMap")
    assert re.fullmatch(r"reranker-settings-[a-z0-9]{10}", settings)  # the hash of its content


@each
def test_every_image_has_a_tag_and_is_one_that_the_dockerfile_makes(name: str) -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "reranker_worker" / "__init__.py").read_text())[1]  # type: ignore[index]
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "deploy" / "docker" / "Dockerfile").read_text(), re.MULTILINE))
    for template in pod_templates(name):
        for container in containers(template):
            image, _, tag = container["image"].partition(":")
            assert tag == version
            assert image.removeprefix("reranker-") in targets

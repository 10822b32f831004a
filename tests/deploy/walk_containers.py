"""Builds the images for real with buildah, runs them with podman as production would, and prints what was seen: sizes, times, memory, verdicts.

    python -m tests.deploy.walk_containers [--work DIR] [--only PART,PART] [--base-archive FILE] [--build-bind SRC:DST ...] [--torch-index URL]

Needs root, buildah, podman, and 8 GB of disk; podman-compose and kubectl for their parts. Everything lives in storage of its own below --work and is
removed at the end (--keep keeps images, so that a second walk builds from its cache). Exit code 0: everything held.

A machine without a container registry loads the base image from --base-archive (`podman save python:3.11-slim-bookworm`) and gives the build its
package registry's configuration with --build-bind. Where root may not raise its limits, name a runtime that does not try with --runtime.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from reranker_worker import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCKER, K8S = ROOT / "deploy" / "docker", ROOT / "deploy" / "k8s"
VERSION = __version__
DEADLINE_S = 180.0
BUILD_DEADLINE_S = 1800.0
PORT = 18080
QUESTION = {"query": "capital of France", "documents": ["Berlin is in Germany.", "Paris is the capital of France."]}
# podman gives a read-only container writable tmpfs for nothing, docker does not: an image with a prewarmed model must run without any.
CONFINED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none")
ASK_READY = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8080{}', timeout=6).status)"
# What the processes of a container hold together, in KiB, without the asking one.
RESIDENT = (
    "import glob,re,os\nprint(sum(int(re.search(r'VmRSS:\\s+(\\d+)', open(p).read())[1]) for p in glob.glob('/proc/[0-9]*/status')"
    " if p.split('/')[2] != str(os.getpid())))"
)


class Walk:
    """The tools with their storage, and the log of what was seen."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.failures = options, work, 0
        self._began = time.monotonic()
        (work / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{work}/graph"\nrunroot = "{work}/run"\n')
        engine = '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        if options.runtime:
            engine += f'runtime = "walk"\n[engine.runtimes]\nwalk = ["{options.runtime}"]\n'
        (work / "containers.conf").write_text(engine)
        self.environ = {
            **os.environ,
            "CONTAINERS_CONF": str(work / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(work / "storage.conf"),
            "TMPDIR": str(work / "tmp"),
            "RERANKER_PORT": str(PORT),
        }
        (work / "tmp").mkdir(exist_ok=True)

    def note(self, text: str) -> None:
        """A line of the log."""
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def check(self, holds: bool, text: str) -> None:
        """A line of the log that says whether something held."""
        self.failures += not holds
        self.note(("ok      " if holds else "FAILED  ") + text)

    def run(self, *command: str, seconds: float = DEADLINE_S, feed: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a tool."""
        return subprocess.run(command, env=self.environ, input=feed, capture_output=True, text=True, timeout=seconds, check=False)

    def must(self, *command: str, seconds: float = DEADLINE_S, feed: str | None = None) -> str:
        """Run a tool that must succeed; what it printed."""
        done = self.run(*command, seconds=seconds, feed=feed)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout.strip()

    def podman_run(self) -> list[str]:
        """`podman run` with what this machine needs."""
        return ["podman", "run", *([f"--cgroup-parent={self.options.cgroup_parent}"] if self.options.cgroup_parent else [])]

    def in_container(self, name: str, code: str) -> str:
        """Python run beside a container's processes; what it printed, or the failure's last line."""
        done = self.run("podman", "exec", name, "python", "-c", code)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    @contextlib.contextmanager
    def worker(self, name: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
        """`podman run -i` of the worker, with its pipes."""
        command = [*self.podman_run(), "--rm", "-i", "--name", name, *CONFINED, *options, f"reranker-worker:{VERSION}"]
        process = subprocess.Popen(command, env=self.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process, process.stdin, process.stdout
        finally:
            self.run("podman", "rm", "-f", "-t", "0", name)
            process.wait(DEADLINE_S)


def until(holds: Callable[[], bool], seconds: float = DEADLINE_S) -> bool:
    """Whether it holds in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def build(walk: Walk) -> None:
    """All targets of the Dockerfile, as README.md says for buildah."""
    options = walk.options
    if options.base_archive and walk.run("podman", "image", "exists", "docker.io/library/python:3.11-slim-bookworm").returncode:
        walk.must("podman", "load", "-q", "-i", options.base_archive, seconds=BUILD_DEADLINE_S)
    binds = [item for bind in options.build_bind for item in ("-v", f"{bind}:ro")]
    arguments = [] if options.torch_index is None else ["--build-arg", f"TORCH_INDEX={options.torch_index}"]
    for target, tag, prewarm in (
        ("example-host", f"reranker-example-host:{VERSION}-no-model", "none"),
        ("prewarm", f"reranker-prewarm:{VERSION}", "artefact"),
        ("worker", f"reranker-worker:{VERSION}", "artefact"),
        ("example-host", f"reranker-example-host:{VERSION}", "artefact"),
    ):
        began = time.monotonic()
        ignore = ("--ignorefile", str(DOCKER / "Dockerfile.dockerignore"))
        chosen = ("--build-arg", "VARIANT=cpu-light", "--build-arg", f"PREWARM={prewarm}")
        how = ("--isolation", "chroot", "--network", "host", "--format", "docker", "--layers", *ignore, *binds, *arguments, *chosen)
        pull = ["--pull-never"] if options.base_archive else []
        command = ["buildah", "bud", *how, *pull, "--target", target, "-t", tag, "-f", str(DOCKER / "Dockerfile"), str(ROOT)]
        walk.must(*command, seconds=BUILD_DEADLINE_S)
        size = int(walk.must("podman", "image", "inspect", tag, "--format", "{{.Size}}")) / 1e6
        walk.check(True, f"built {tag} in {time.monotonic() - began:.0f} s: {size:,.0f} MB")
    base = int(walk.must("podman", "image", "inspect", "python:3.11-slim-bookworm", "--format", "{{.Size}}")) / 1e6
    walk.note(f"of each, the base image is {base:,.0f} MB")


def contents(walk: Walk) -> None:
    """What an image must not hold."""
    names = ("*/bin/*gcc*", "*/bin/cc", "*/.cache/pip", "*/id_rsa", "*/.git", "*/.env", "*/.venv/bin/pip*")
    unwanted = " -o ".join(f"-path {name}" for name in names).split()
    for image in ("worker", "example-host", "prewarm"):
        tag = f"reranker-{image}:{VERSION}"
        look = [*walk.podman_run(), "--rm", *CONFINED, "--user", "0", "--entrypoint", "find", tag, "/", "-xdev"]
        found = walk.run(*look, "(", *unwanted, ")").stdout.strip()  # root without capabilities may not enter a few places
        walk.check(found == "", f"{tag} holds no compiler, pip cache, key or repository {found}")
        user = walk.must(*walk.podman_run(), "--rm", *CONFINED, "--entrypoint", "id", tag, "-u")
        walk.check(user == "10001", f"{tag} runs as {user}")
    image = f"reranker-prewarm:{VERSION}"
    traces = walk.must("podman", "history", "--no-trunc", image) + walk.must("podman", "inspect", image)
    seen = [bind.split(":")[0] for bind in walk.options.build_bind if bind.split(":")[0] in traces]
    walk.check(not seen, f"no trace of the building machine's configuration in the image's history {seen}")


def pipe(walk: Walk) -> None:
    """The worker by a pipe, confined: as `docker run -i` and as a host would hold it."""
    began = time.monotonic()
    with walk.worker("walk-pipe", "--memory", "640m") as (process, stdin, stdout):
        ready = json.loads(stdout.readline())
        walk.check(ready["type"] == "ready", f"ready {time.monotonic() - began:.1f} s after `podman run`; loading took {ready['load_time_ms']} ms")
        scores = ask(stdin, stdout, QUESTION)["scores"]
        walk.check(scores[1] > 0.9 > 0.1 > scores[0], f"scores {scores}")
        status = walk.in_container("walk-pipe", "print(open('/proc/1/status').read())")
        facts = {key: re.search(rf"^{key}:\s+(\S+)", status, re.MULTILINE)[1] for key in ("Uid", "CapEff", "NoNewPrivs", "Seccomp")}  # type: ignore[index]
        walk.check(facts == {"Uid": "10001", "CapEff": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"}, f"process 1: {facts}")
        walk.check("Read-only file system" in walk.in_container("walk-pipe", "open('/opt/reranker-worker/x', 'w')"), "the file system is read-only")
        for number in range(100):
            ask(stdin, stdout, {"query": f"question {number}", "documents": [f"document {number} {other} " * 20 for other in range(10)]})
        walk.note(f"resident after 100 requests of 10 documents: {int(walk.in_container('walk-pipe', RESIDENT)) / 1024:.0f} MiB")
        began = time.monotonic()
        done = walk.run("podman", "healthcheck", "run", "walk-pipe")
        took = time.monotonic() - began
        status = walk.must("podman", "inspect", "walk-pipe", "--format", "{{.State.Health.Status}}")
        walk.check((done.returncode, status) == (0, "healthy"), f"HEALTHCHECK (check --deploy): {status}, {took:.1f} s {done.stdout}")
        stdin.write(json.dumps({"query": "last", "documents": ["document"] * 50}) + "\n")
        stdin.close()
        last = json.loads(stdout.readline())
        walk.check(len(last["scores"]) == 50 and process.wait(DEADLINE_S) == 0, "after the end of input the last request is answered, exit code 0")
    with walk.worker("walk-stop") as (process, stdin, stdout):
        stdout.readline()
        began = time.monotonic()
        walk.must("podman", "stop", "-t", "20", "walk-stop")
        walk.check(process.wait(DEADLINE_S) == 0, f"`podman stop` (SIGTERM) drains, exit code {process.returncode}, {time.monotonic() - began:.1f} s")
    with walk.worker("walk-wrong", "-e", "RERANKING_MODEL_PATH=/nowhere") as (process, stdin, stdout):
        stdin.write('{"type":"ready"}\n')
        stdin.flush()
        code = process.wait(DEADLINE_S)
        walk.check(code == 66, f"a model that is not there: exit code {code}, {stdout.read().strip().splitlines()[-1]}")


def ask(stdin: IO[str], stdout: IO[str], body: dict[str, Any]) -> dict[str, Any]:
    """One request by the pipe."""
    stdin.write(json.dumps(body) + "\n")
    stdin.flush()
    return dict(json.loads(stdout.readline()))


def memory(walk: Walk) -> None:
    """The limit is the container's, and too little of it ends in a sentence or in a killed engine, never in a hanging host."""
    image = f"reranker-worker:{VERSION}"
    hog = [*walk.podman_run(), "--rm", *CONFINED, "--memory", "128m", "--memory-swap", "128m", "--entrypoint", "python", image]
    code = walk.run(*hog, "-c", "x = bytearray(300 << 20)").returncode
    walk.check(code == 137, f"300 MiB under --memory 128m: killed, exit code {code}")
    with walk.worker("walk-tight", "--memory", "100m", "--memory-swap", "100m") as (process, stdin, stdout):
        stdin.write(json.dumps(QUESTION) + "\n")
        stdin.flush()
        answers = [json.loads(line) for line in stdout]
        code = process.wait(DEADLINE_S)
        walk.check(code not in (0, 137), f"the worker under --memory 100m: exit code {code}, {[answer.get('code') for answer in answers]}")


def prewarm(walk: Walk) -> None:
    """The prewarming image fills an empty volume, finds it filled the second time, and says so without the network."""
    # ru_maxrss: the largest process, in KiB.
    code = "import resource,subprocess as s; c=s.run(['python','-m','reranker_worker','prewarm']).returncode; "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss//1024); raise SystemExit(c)"
    mounts = ("--tmpfs", "/tmp:size=256m", "-v", "walk-cache:/var/cache/reranker-worker", "--memory", "2g")
    try:
        for what in ("made now", "was there"):
            began = time.monotonic()
            command = [*walk.podman_run(), "--rm", *CONFINED, *mounts, "--entrypoint", "python", f"reranker-prewarm:{VERSION}", "-c", code]
            done = walk.run(*command, seconds=BUILD_DEADLINE_S)
            most = done.stdout.split()[-1] if done.stdout else "?"
            took = time.monotonic() - began
            walk.check(done.returncode == 0 and what in done.stdout, f"prewarm into a volume, {what}: {took:.1f} s, at most {most} MiB resident")
    finally:
        walk.run("podman", "volume", "rm", "-f", "walk-cache")


def compose(walk: Walk) -> None:
    """Both compose files with podman-compose."""
    if not tool("podman-compose"):
        walk.note("skipped: podman-compose is not installed")
        return
    more = [f"--podman-run-args=--cgroup-parent={walk.options.cgroup_parent}"] if walk.options.cgroup_parent else []
    cluster = [f"reranker-cluster_{name}_1" for name in ("master", "node-1", "node-2")]
    for file, hosts in (("compose.yml", ["reranker_node_1"]), ("compose.cluster.yml", cluster)):
        command = [str(tool("podman-compose")), *more, "-f", str(DOCKER / file)]
        began = time.monotonic()
        try:
            walk.must(*command, "up", "-d", "--no-build")
            walk.check(until(lambda: get("/readyz") == 200), f"{file}: ready through its published port {time.monotonic() - began:.1f} s after `up`")
            for host in hosts:
                healthy = until(lambda host=host: walk.run("podman", "healthcheck", "run", host).returncode == 0)  # type: ignore[misc]
                status = walk.must("podman", "inspect", host, "--format", "{{.State.Health.Status}}, limit {{.HostConfig.Memory}} bytes")
                walk.check(healthy and status.startswith("healthy"), f"{host}: {status}, holds {int(walk.in_container(host, RESIDENT)) // 1024} MiB")
                if file == "compose.cluster.yml":
                    made = walk.in_container(host, "import os; print(os.listdir('/var/cache/reranker-worker/artefacts'))")
                    refused = walk.in_container(host, "open('/var/cache/reranker-worker/x', 'w')")
                    walk.check("onnx-float32" in made and "Read-only" in refused, f"{host}: the shared cache is there and read-only: {made}")
            killed = walk.in_container(hosts[0], KILL_WORKER)
            noticed = walk.run("podman", "healthcheck", "run", hosts[0]).returncode
            back = until(lambda: get("/readyz") == 200)
            walk.check(back and noticed == 1, f"{hosts[0]}: worker {killed} killed: the health check said {noticed}, and it came back")
            began = time.monotonic()
            walk.must("podman", "stop", "-t", "20", hosts[0])
            code = walk.must("podman", "inspect", hosts[0], "--format", "{{.State.ExitCode}}")
            walk.check(code == "0", f"{hosts[0]}: stopped in {time.monotonic() - began:.1f} s, exit code {code}")
        finally:
            walk.run(*command, "down", "-v")


# The worker is the child of process 1 whose command names the script and which is no engine.
KILL_WORKER = (
    "import glob,os,signal\nfor p in glob.glob('/proc/[0-9]*/stat'):\n    s=open(p).read().rsplit(')',1)[1].split()\n    pid=int(p.split('/')[2])\n"
    "    if s[1]=='1' and b'reranking_server' in open(f'/proc/{pid}/cmdline','rb').read():\n        os.kill(pid,signal.SIGKILL); print(pid)"
)


def get(path: str) -> int:
    """The status of a GET to the published port; 0 while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=6) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def kubernetes(walk: Walk) -> None:
    """Replica 0 of each rendered StatefulSet as a pod (and the Job before it), with the bundled model in place of one from the hub."""
    try:
        import yaml
    except ImportError:
        walk.note("skipped: PyYAML is not installed")
        return
    if not tool("kubectl"):
        walk.note("skipped: kubectl is not installed")
        return
    for name in ("base", "overlays/pvc-per-pod", "overlays/shared-cache"):
        rendered = [document for document in yaml.safe_load_all(walk.must("kubectl", "kustomize", str(K8S / name))) if document]
        probes = {kind: probe["httpGet"]["path"] for kind, probe in probes_of(rendered)}
        file = walk.work / "pods.yaml"
        file.write_text(yaml.safe_dump_all(as_pods(rendered)))
        began = time.monotonic()
        try:
            walk.must("podman", "play", "kube", "--network", "none", str(file))
            for kind, path in probes.items():
                answered = until(lambda path=path: walk.in_container("reranker-host-0-host", ASK_READY.format(path)) == "200")  # type: ignore[misc]
                walk.check(answered, f"{name}: {kind} {path} answers 200, {time.monotonic() - began:.1f} s after `podman play kube`")
            wanted = "{{.HostConfig.Memory}} {{.HostConfig.ReadonlyRootfs}} {{.Config.User}}"
            facts = walk.must("podman", "inspect", "reranker-host-0-host", "--format", wanted)
            walk.check(facts.startswith("536870912 true 10001"), f"{name}: memory limit, read-only root, user: {facts}")
            status = walk.in_container("reranker-host-0-host", "print(open('/proc/1/status').read())")
            walk.check("CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status, f"{name}: no capabilities, no new privileges")
            if name != "base":
                refused = walk.in_container("reranker-host-0-host", "open('/var/cache/reranker-worker/x', 'w')")
                listed = walk.in_container("reranker-host-0-host", "import os; print(os.listdir('/var/cache/reranker-worker/artefacts'))")
                walk.check("Read-only" in refused and "onnx" in listed, f"{name}: the model's volume is filled and read-only: {listed}")
            walk.note(f"{name}: the host's container holds {int(walk.in_container('reranker-host-0-host', RESIDENT)) // 1024} MiB")
        finally:
            walk.run("podman", "play", "kube", "--down", str(file))
            walk.run("podman", "volume", "prune", "-f")


def probes_of(documents: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The probes of the host."""
    (stateful,) = (document for document in documents if document["kind"] == "StatefulSet")
    (host,) = stateful["spec"]["template"]["spec"]["containers"]
    return [(kind, host[kind]) for kind in ("startupProbe", "readinessProbe", "livenessProbe")]


def as_pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `podman play kube` 4.3 runs: ConfigMaps, claims, the Job's pod and replica 0. It knows no httpGet probes without curl in the image, and
    starts init containers again under restartPolicy Always."""
    found: list[dict[str, Any]] = []
    for document in documents:
        document["metadata"].pop("namespace", None)
        kind, spec = document["kind"], document.get("spec", {})
        if kind == "ConfigMap":
            document["data"] |= {"RERANKING_MODEL_PATH": "bundled"}
        if kind in ("ConfigMap", "PersistentVolumeClaim"):
            found.append(document)
        if kind not in ("StatefulSet", "Job"):
            continue
        name = document["metadata"]["name"] + ("-0" if kind == "StatefulSet" else "")
        pod = spec["template"]["spec"]
        for claim in spec.get("volumeClaimTemplates", []):
            claimed = f"{claim['metadata']['name']}-{name}"
            found.append({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claimed}, "spec": claim["spec"]})
            pod.setdefault("volumes", []).append({"name": claim["metadata"]["name"], "persistentVolumeClaim": {"claimName": claimed}})
        for container in pod["containers"]:
            for key in ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "ports"):
                container.pop(key, None)
        labels = spec["template"]["metadata"].get("labels", {})
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": {**pod, "restartPolicy": "Never"}})
    return sorted(found, key=lambda document: document["metadata"]["name"].startswith("reranker-host"))  # the Job's pod before the host's


def host_image(walk: Walk) -> None:
    """The lines of README.md that put the worker into a host's own image."""
    readme = (DOCKER / "README.md").read_text()
    (lines,) = re.findall(r"<!-- host image -->\s*```dockerfile\n(.*?)```", readme, re.DOTALL)
    directory = walk.work / "host-image"
    directory.mkdir(exist_ok=True)
    (directory / "Dockerfile").write_text(re.sub(r"^FROM (?!reranker).*", f"FROM {walk.options.host_base}", lines, count=1, flags=re.MULTILINE))
    if walk.options.host_base_archive:
        walk.must("podman", "load", "-q", "-i", walk.options.host_base_archive, seconds=BUILD_DEADLINE_S)
    pull = ["--pull-never"] if walk.options.host_base_archive else []
    walk.must("buildah", "bud", "--isolation", "chroot", *pull, "--format", "docker", "-t", "host-image", str(directory), seconds=BUILD_DEADLINE_S)
    command = [*walk.podman_run(), "--rm", "-i", *CONFINED, "--user", "1234", "host-image"]
    script = "exec $RERANKING_PYTHON $RERANKING_SCRIPT_PATH"
    done = walk.run(*command, "sh", "-c", script, feed=json.dumps(QUESTION) + "\n")
    scores = [json.loads(line).get("scores") for line in done.stdout.splitlines()]
    holds = done.returncode == 0 and bool(scores) and scores[-1] is not None
    walk.check(holds, f"in a host's image, as user 1234: exit code {done.returncode}, scores {scores[-1:]}")
    if done.returncode:
        walk.note(done.stderr[-500:])


def tool(name: str) -> str | None:
    """A program beside this Python or on PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


PARTS: dict[str, Callable[[Walk], None]] = {
    "build": build,
    "contents": contents,
    "pipe": pipe,
    "memory": memory,
    "prewarm": prewarm,
    "compose": compose,
    "kubernetes": kubernetes,
    "host-image": host_image,
}


def main() -> int:
    """Walk; the exit code."""
    assert __doc__ is not None
    first, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where images, volumes and files live (default: a new temporary directory)")
    parser.add_argument("--keep", action="store_true", help="keep the images there for the next walk")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas (default: all of {', '.join(PARTS)})")
    parser.add_argument("--base-archive", help="load the base image python:3.11-slim-bookworm from this file instead of a registry")
    parser.add_argument("--host-base", default="docker.io/library/debian:12-slim", help="what the host's image starts from (default: %(default)s)")
    parser.add_argument("--host-base-archive", help="load it from this file")
    parser.add_argument("--build-bind", action="append", default=[], metavar="SRC:DST", help="bind a file into the build (pip's configuration)")
    parser.add_argument("--torch-index", help="index of CPU builds of torch ('': as pip is configured)")
    parser.add_argument("--runtime", default="", help="OCI runtime")
    parser.add_argument("--cgroup-parent", default="", help="cgroup for the containers")
    options = parser.parse_args()
    missing = [name for name in ("buildah", "podman") if not tool(name)]
    if missing or os.geteuid() != 0:
        print(f"This walk needs root and {', '.join(missing) or 'nothing else'}.", file=sys.stderr)
        return 69
    work = (options.work or Path(tempfile.mkdtemp(prefix="walk-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    walk = Walk(options, work)
    try:
        walk.note(", ".join(walk.must(name, "--version") for name in ("buildah", "podman")))
        for part in options.only.split(","):
            walk.note(f"--- {part}")
            PARTS[part](walk)
    finally:
        for command in (("podman", "pod", "rm", "-fa"), ("podman", "rm", "-fa"), ("podman", "volume", "prune", "-f"), ("buildah", "rm", "-a")):
            walk.run(*command)
        if not options.keep:
            walk.run("podman", "rmi", "-fa")
            shutil.rmtree(work, ignore_errors=True)
    walk.note("everything held" if not walk.failures else f"{walk.failures} checks FAILED")
    return 1 if walk.failures else 0


if __name__ == "__main__":
    sys.exit(main())

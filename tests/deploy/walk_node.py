"""`python -m tests.deploy.walk_node --rootfs DIR`: deploy/ansible and deploy/systemd on real nodes: systemd as PID 1, sshd, a real model.

Two throw-away nodes (systemd-nspawn over an overlay of a Debian 12 root file system with openssh-server, python3-venv and python3-apt) are
deployed over ssh, then harmed: killed engines, workers and hosts, no memory, a model that is not there; then upgraded and rolled back. A
third is set up by hand with the commands of deploy/systemd/README.md. With --full the second node installs torch and prewarms int8,
and the first serves that artefact from a read-only cache. Every step that does not go as promised ends the walk with exit code 1.
Needs root, systemd-container and ansible-core. About 10 minutes, with --full 15. The node tool is `node.sh` of the shared tools; see --node-tool.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
HOST = "reranker-example-host.service"
PREWARM = "reranker-prewarm.service"
RUNTIME = f"/run/systemd/system/{HOST}.d"
LIGHT = ("onnxruntime", "onnx", "tokenizers", "numpy", "orjson")
PROCESSES = {"host": "example_host.py", "worker": "current/reranking_server.py", "engine": "engine.child"}

# Runs in the node: one request, or one after the other until a file appears; tells what came of them.
CLIENT = r"""
import json, os, random, sys, time, urllib.error, urllib.request
what, argument = sys.argv[1], sys.argv[2]
def ask(documents, timeout=40):
    body = json.dumps({"query": "capital of France", "documents": documents}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{sys.argv[3]}/rerank", data=body), timeout=timeout) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError as error:
        return 0, {"code": type(error).__name__}
PAIR = ["Berlin is in Germany.", "Paris is the capital of France."]
if what == "pair":
    print(json.dumps(ask(PAIR)))
elif what == "large":
    random.seed(int(argument))
    print(json.dumps(ask([" ".join(f"word{random.randrange(99999)}" for _ in range(400)) for _ in range(64)])))
else:
    found, failures, last, gap = 0, {}, time.monotonic(), 0.0
    while not os.path.exists(argument):
        status, answer = ask(PAIR)
        if status == 200:
            found, gap, last = found + 1, max(gap, time.monotonic() - last), time.monotonic()
        else:
            failures[answer.get("code", str(status))] = failures.get(answer.get("code", str(status)), 0) + 1
        time.sleep(0.02)
    print(json.dumps({"ok": found, "failures": failures, "longest_gap_s": round(gap, 2)}))
"""


class WalkError(Exception):
    """Something did not go as promised."""


def check(true: object, text: str) -> None:
    if not true:
        raise WalkError(text)


class Node:
    """One node: started by the node tool, talked to over ssh."""

    def __init__(self, name: str, port: int, given: argparse.Namespace, place: Path) -> None:
        self.name, self.port, self._given, self._place = name, port, given, place
        self.http = port + 100
        self._ssh = ["ssh", "-q", "-i", str(place / "key"), "-p", str(port), *SSH_OPTIONS, "root@127.0.0.1"]

    def up(self) -> None:
        self._tool("up", self.name, str(self.port), self._given.rootfs, *self._given.bind)
        home = self._place / "nodes" / self.name / "root/root/.ssh"
        home.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(self._place / "key.pub", home / "authorized_keys")
        self.until(lambda: self.try_run("true").returncode == 0, "ssh answers")
        # The nodes share this machine's loopback.
        self.run(f"mkdir -p {RUNTIME} && cat > {RUNTIME}/zz-port.conf", f"[Service]\nEnvironment=EXAMPLE_HOST_LISTEN=127.0.0.1:{self.http}\n")

    def down(self) -> None:
        self._tool("down", self.name)

    def _tool(self, *arguments: str) -> None:
        environ = {**os.environ, "NODES": str(self._place / "nodes")}
        subprocess.run(["bash", self._given.node_tool, *arguments], env=environ, check=False, timeout=120, stdout=subprocess.DEVNULL)

    def start(self, command: str, stdin: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen([*self._ssh, command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
        process.stdin = None
        return process

    def try_run(self, command: str, stdin: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._ssh, command], input=stdin, capture_output=True, text=True, timeout=timeout)

    def run(self, command: str, stdin: str = "", timeout: float = 300) -> str:
        done = self.try_run(command, stdin, timeout)
        check(done.returncode == 0, f"{self.name}: `{command}` ended with {done.returncode}: {done.stdout[-1500:]} {done.stderr[-500:]}")
        return done.stdout.strip()

    def until(self, condition: Callable[[], object], what: str, seconds: float = 60) -> float:
        """Wait for a condition; how long it took."""
        begin = time.monotonic()
        while not condition():
            check(time.monotonic() - begin < seconds, f"{self.name}: not within {seconds:g} s: {what}")
            time.sleep(0.1)
        return time.monotonic() - begin

    # --- the deployment ---

    def show(self, unit: str, *names: str) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.run(f"systemctl show {unit} -p {','.join(names)}").splitlines())

    def ask(self, what: str = "pair", argument: str = "1") -> tuple[int, dict]:
        status, body = json.loads(self.run(f"python3 - {what} {argument} {self.http}", CLIENT))
        return status, body

    def scores(self) -> bool:
        status, body = self.ask()
        return status == 200 and body["scores"][1] > 0.5 > body["scores"][0]

    def pid(self, what: str) -> int:
        found = self.try_run(f"pgrep -f {shlex.quote('[' + PROCESSES[what][0] + ']' + PROCESSES[what][1:])}").stdout.split()
        return int(found[0]) if found else 0

    def alive(self, pid: int) -> bool:
        return self.try_run(f"kill -0 {pid}").returncode == 0

    def journal(self, unit: str = HOST, since: str = "-1h") -> str:
        return self.run(f"journalctl -u {unit} -o cat --no-pager --since '{since}'")

    def drop_in(self, text: str) -> None:
        """A runtime drop-in of the host, and a restart."""
        self.run(f"cat > {RUNTIME}/zz-walk.conf; systemctl daemon-reload; systemctl restart {HOST}", f"[Service]\n{text}\n")

    def no_drop_in(self) -> None:
        self.run(f"rm -f {RUNTIME}/zz-walk.conf; systemctl daemon-reload; systemctl reset-failed {HOST}; systemctl restart {HOST}")

    @contextlib.contextmanager
    def asking(self) -> Iterator[dict]:
        """Ask without a pause while the body does something; what came of it is in the value afterwards."""
        self.run("rm -f /run/walk-stop")
        process, told = self.start(f"python3 - probe /run/walk-stop {self.http}", CLIENT), {}
        self.until(lambda: self.scores(), "the first answer")
        try:
            yield told
            self.until(self.scores, "an answer after it all")
        finally:
            self.run("touch /run/walk-stop")
            told.update(json.loads(process.communicate(timeout=60)[0]))


SSH_OPTIONS = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10"]


class Walk:
    """The steps, in order; each says what it saw."""

    def __init__(self, given: argparse.Namespace, place: Path) -> None:
        self.given, self.place, self.began = given, place, time.monotonic()
        self.one, self.two, self.hand = (Node(f"walk{n}", given.port + n, given, place) for n in (1, 2, 3))
        text = (Path(given.checkout) / "reranker_worker/__init__.py").read_text()
        self.version = re.findall(r'__version__ = "(.*)"', text)[0]

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def play(self, *options: str, **values: object) -> dict[str, dict[str, int]]:
        """Run the playbook; the recap by node, with the seconds under "s"."""
        begin = time.monotonic()
        done = self.try_to_play(*options, **values)
        check(done.returncode == 0, "the playbook failed: " + done.stdout[-4000:] + done.stderr[-500:])
        lines = done.stdout.rpartition("PLAY RECAP")[2].splitlines()
        recap = {line.split()[0]: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", line)} for line in lines if "changed=" in line}
        seconds = time.monotonic() - begin
        shown = ", ".join(f"{name} changed={counts['changed']} of {counts['ok']}" for name, counts in recap.items())
        self.say(f"  playbook {' '.join(options)}: {shown}, in {seconds:.0f} s")
        return recap

    def try_to_play(self, *options: str, **values: object) -> subprocess.CompletedProcess[str]:
        hosts = {node.name: {"ansible_port": node.port} for node in (self.one, self.two)}
        common = {
            "ansible_host": "127.0.0.1",
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.place / "key"),
            "ansible_ssh_common_args": " ".join(SSH_OPTIONS),
            "reranker_worker_checkout": str(self.given.checkout),
            "reranker_worker_host_service": HOST,
            "reranker_worker_wheelhouse": str(self.given.wheelhouse),
        }
        (self.place / "inventory.yml").write_text(json.dumps({"reranker_nodes": {"hosts": hosts, "vars": common}}))
        command = [self.given.ansible, "-i", str(self.place / "inventory.yml"), "site.yml", "-e", json.dumps(values), *options]
        environ = {**os.environ, "ANSIBLE_FORCE_COLOR": "0", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
        folder = Path(self.given.checkout) / "deploy/ansible"
        return subprocess.run(["nice", "-n", "19", *command], cwd=folder, env=environ, capture_output=True, text=True, timeout=1500)

    # --- steps ---

    def step_check_mode_on_bare_nodes(self) -> None:
        recap = self.play("--check", "--diff")
        check(all(counts["changed"] > 5 for counts in recap.values()), "check mode foresees nothing")
        for node in (self.one, self.two):
            found = node.try_run("ls -d /opt/reranker-worker /etc/reranker-worker /etc/systemd/system/reranker*")
            check(not found.stdout, f"check mode made {found.stdout}")

    def step_deploy_twice(self) -> None:
        self.play()
        second = self.play("--diff")
        check(all(counts["changed"] == 0 for counts in second.values()), "the second run changed something")
        third = self.play("--check", "--diff")
        check(all(counts["changed"] == 0 for counts in third.values()), "check mode foresees changes where there are none")

    def step_the_nodes_serve(self) -> None:
        for node in (self.one, self.two):
            check(node.scores(), f"{node.name} does not score")
            found = node.try_run("systemd-analyze verify --man=no /etc/systemd/system/reranker*.service")
            check(found.returncode == 0 and not found.stderr, found.stderr)
            exposure = node.run(f"systemd-analyze security --no-pager {HOST} | tail -1").partition("service: ")[2]
            disk = node.run("du -sm /opt/reranker-worker/releases/* | cut -f1")
            memory = int(node.show(HOST, "MemoryCurrent")["MemoryCurrent"]) >> 20
            failed = node.run("systemctl --failed --no-legend")
            check(not failed, failed)
            self.say(f"  {node.name}: a pair is scored; exposure {exposure}; release {disk} MB on disk; host and worker {memory} MiB")

    def step_the_worker_is_confined(self) -> None:
        node = self.one
        for what in PROCESSES:
            status = node.run(f"cat /proc/{node.pid(what)}/status")
            for line in ("CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
                check(line in status, f"{what} has not {line}")
            check("Uid:\t0" not in status, f"{what} runs as root")
        user = node.run(f"ps -o user= -p {node.pid('engine')}")
        for place in ("/opt/reranker-worker/current", "/var/cache/reranker-worker"):
            tried = node.try_run(f"nsenter -t {node.pid('engine')} -m setpriv --reuid {user} --clear-groups touch {place}/x")
            check(tried.returncode, f"the serving user can write {place}")
        self.say(f"  host, worker and engine: user {user}, no capability, no new privileges, seccomp; neither code nor cache can be written")

    def step_the_log_is_json_lines(self) -> None:
        lines = [line for line in self.one.journal().splitlines() if line.startswith('{"time"')]
        check(lines and all(json.loads(line)["level"] for line in lines), "the worker's log is not in the journal as JSON lines")
        self.say(f"  {len(lines)} JSON lines of the worker in the journal")

    def step_a_killed_engine_costs_no_request(self) -> None:
        node, before = self.one, {what: self.one.pid(what) for what in PROCESSES}
        with node.asking() as told:
            node.run(f"kill -9 {before['engine']}")
            node.until(lambda: node.pid("engine") not in (0, before["engine"]), "a new engine")
        check(not told["failures"], f"requests failed: {told}")
        check((node.pid("host"), node.pid("worker")) == (before["host"], before["worker"]), "host or worker were replaced")
        self.say(f"  engine killed while asked: {told}; host and worker are the same processes")

    def step_a_killed_worker_is_started_again(self) -> None:
        node, before = self.one, {what: self.one.pid(what) for what in PROCESSES}
        with node.asking() as told:
            node.run(f"kill -9 {before['worker']}")
            node.until(lambda: node.pid("worker") not in (0, before["worker"]), "a new worker")
        check(node.pid("host") == before["host"], "the host was replaced")
        check(not node.alive(before["engine"]), "the engine outlived its worker")
        self.say(f"  worker killed while asked: {told}; the host is the same process, the old engine is gone")

    def step_a_killed_host_leaves_nothing_behind_and_comes_back(self) -> None:
        node, before = self.one, {what: self.one.pid(what) for what in PROCESSES}
        restarts = int(node.show(HOST, "NRestarts")["NRestarts"])
        node.run(f"kill -9 {before['host']}")
        seconds = node.until(lambda: node.show(HOST, "NRestarts")["NRestarts"] == str(restarts + 1) and node.scores(), "the host is back")
        check(not [what for what, pid in before.items() if node.alive(pid)], "a process was left behind")
        self.say(f"  host killed: worker and engine went with it, all back and scoring after {seconds:.1f} s (RestartSec=5)")

    def step_a_host_that_hangs_is_restarted(self) -> None:
        node = self.one
        node.drop_in("WatchdogSec=4")
        node.until(node.scores, "the host serves")
        host = node.pid("host")
        node.run(f"kill -STOP {host}")
        seconds = node.until(lambda: node.pid("host") not in (0, host) and node.scores(), "the watchdog restarts it")
        node.no_drop_in()
        self.say(f"  host stopped (SIGSTOP, WatchdogSec=4): back after {seconds:.1f} s")

    def step_the_engine_running_out_of_memory_is_survived(self) -> None:
        node = self.one
        node.drop_in("MemoryMax=190M")
        node.until(node.scores, "the host serves")
        since, before = node.run("date '+%F %T'"), node.show(HOST, "MainPID", "NRestarts")
        answers = []
        for number in range(6):
            status, body = node.ask("large", str(number))
            answers.append(body.get("code", status))
            if "an engine ended" in node.journal(since=since):
                break
        check("an engine ended: it was killed by SIGKILL" in node.journal(since=since), f"no engine was killed: {answers}")
        seconds = node.until(node.scores, "a small request is answered")
        after = node.show(HOST, "MainPID", "NRestarts", "ActiveState")
        check(after == {**before, "ActiveState": "active"}, f"{before} became {after}")
        node.no_drop_in()
        self.say(f"  MemoryMax=190M and 64 documents of 400 words: {answers}; unit active, same host; a pair scored {seconds:.1f} s later")

    def step_a_large_host_survives_what_the_engine_does_not(self) -> None:
        """The kernel kills the largest process of the unit: a database would be it, unless the engine offers itself."""
        node = self.one
        node.drop_in("MemoryMax=560M")
        node.until(node.scores, "the host serves")
        score = node.run(f"cat /proc/{node.pid('engine')}/oom_score_adj")
        group = f"/sys/fs/cgroup/memory/system.slice/{HOST}/cgroup.procs"
        database = f"""import os
open({group!r}, "w").write(str(os.getpid()))
data = bytearray(330 << 20)
for place in range(0, len(data), 4096):
    data[place] = 1
print(os.getpid(), flush=True)
import time; time.sleep(120)"""
        process = node.start("python3 -u -", database)
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        check(pid.isdigit(), "the stand-in for a database could not start")
        for number in range(4):
            node.ask("large", str(number))
        survived = node.alive(int(pid))
        node.try_run(f"kill -9 {pid}")
        process.wait(30)
        node.no_drop_in()
        end = "survived" if survived else "KILLED"
        self.say(f"  a 330 MiB process in the host's place, MemoryMax=560M, oom_score_adj of the engine {score}: {end}")
        check(survived, "the kernel killed the stand-in for the database instead of the engine")

    def step_no_model_no_host(self) -> None:
        node = self.one
        node.run("echo RERANKING_MODEL_PATH=/nowhere >> /etc/reranker-worker/worker.env; systemctl stop reranker-prewarm")
        started = node.try_run(f"systemctl start {HOST}")
        state = node.show(HOST, "ActiveState")["ActiveState"]
        check(started.returncode != 0 and state == "inactive", f"the host started without a model: {started.returncode}, {state}")
        told = [line for line in node.journal(PREWARM, "-1min").splitlines() if "nowhere" in line]
        check(told, "the journal does not say why")
        recap = self.play("--limit", node.name)
        check(recap[node.name]["changed"] >= 1 and node.scores(), "the playbook does not mend it")
        self.say(f"  the host stays inactive; the journal says: {told[0][:150]}; the playbook mends it")

    def step_upgrade_and_rollback(self) -> None:
        for version in (f"{self.version}-2", self.version):
            with self.one.asking() as first, self.two.asking() as second:
                recap = self.play(reranker_worker_version=version)
            for node, told in ((self.one, first), (self.two, second)):
                at = node.run("readlink /opt/reranker-worker/current")
                served = node.run(f"readlink /proc/{node.pid('engine')}/cwd; tr '\\0' '\\n' < /proc/{node.pid('engine')}/cmdline")
                check(at == f"releases/{version}" and f"releases/{version}\n" in served + "\n", f"{node.name} is at {at}, the engine runs {served}")
                self.say(f"  {node.name} at {version}, the engine too; asked meanwhile: {told}")
        check(all(counts["changed"] <= 2 for counts in recap.values()), "a rollback is one link and one restart")

    def step_a_release_that_cannot_serve_is_never_switched_to(self) -> None:
        before = self.one.pid("host")
        settings = {"RERANKING_MODEL_PATH": "/nowhere"}
        told = self.try_to_play(reranker_worker_version=f"{self.version}-bad", reranker_worker_settings=settings)
        check(told.returncode != 0, "a release that cannot serve was accepted")
        check(self.one.pid("host") == before and self.one.scores(), "the first node was harmed")
        check(self.one.run("readlink /opt/reranker-worker/current") == f"releases/{self.version}", "the first node was switched")
        check(self.two.try_run(f"test -e /opt/reranker-worker/releases/{self.version}-bad").returncode, "the roll-out went on to the second node")
        self.one.run(f"rm -r /opt/reranker-worker/releases/{self.version}-bad")
        self.play()
        self.say("  the roll-out stopped at the first node, which went on serving; the second was not touched")

    def step_by_hand(self) -> None:
        self.hand.up()
        text = (Path(self.given.checkout) / "deploy/systemd/README.md").read_text()
        commands = text.split("<!-- install -->")[1].split("```bash\n")[1].split("```")[0]
        tar = subprocess.run(["tar", "-C", self.given.checkout, "-cf", "-", "."], capture_output=True, check=True).stdout
        self.hand.run("mkdir -p /root/checkout")
        subprocess.run([*self.hand._ssh, "tar -C /root/checkout -xf -"], input=tar, check=True, timeout=120)
        begin = time.monotonic()
        self.hand.run(f"set -e; cd /root/checkout; {commands}", timeout=600)
        check(self.hand.scores(), "it does not score")
        self.say(f"  deploy/systemd/README.md, pasted into a bare node: scoring after {time.monotonic() - begin:.0f} s")
        self.hand.down()

    def step_full_installation_prewarms_int8_under_its_hardening(self) -> None:
        node = self.two
        values = {"version": f"{self.version}-full", "install": "full", "wheelhouse": "", "torch_index": self.given.torch_index}
        values |= {"settings": {"RERANKING_DTYPE": "int8"}, "pip_environment": dict(pair.split("=", 1) for pair in self.given.pip_env)}
        for run in ("first", "second"):
            changed = self.play("--limit", node.name, **{f"reranker_worker_{name}": value for name, value in values.items()})[node.name]["changed"]
            check(run == "first" or not changed, "the second run changed something")
        disk = node.run(f"du -sm /opt/reranker-worker/releases/{self.version}-full | cut -f1")
        node.run("rm -rf /var/cache/reranker-worker/artefacts/*")
        begin = time.monotonic()
        node.run(f"systemctl restart {PREWARM}")
        check('"dtype":"int8"' in node.journal(), "the host does not serve int8")
        node.until(node.scores, "the host serves")
        seconds = time.monotonic() - begin
        self.say(f"  full release {disk} MB; reranker-prewarm.service made the int8 artefact again in {seconds:.0f} s, hardened as it is")

    def step_a_light_node_serves_from_a_read_only_cache(self) -> None:
        node = self.one
        packed = self.place / "cache.tar"
        with packed.open("wb") as file:
            subprocess.run([*self.two._ssh, "tar -C /var/cache/reranker-worker -cf - ."], stdout=file, check=True, timeout=120)
        with packed.open("rb") as file:
            subprocess.run([*node._ssh, "mkdir -p /srv/cache && tar -C /srv/cache -xf -"], stdin=file, check=True, timeout=120)
        node.run("mount --bind /srv/cache /var/cache/reranker-worker && mount -o remount,ro,bind /var/cache/reranker-worker")
        recap = self.play("--limit", node.name, reranker_worker_prewarm="check", reranker_worker_settings={"RERANKING_DTYPE": "int8"})
        again = self.play("--limit", node.name, reranker_worker_prewarm="check", reranker_worker_settings={"RERANKING_DTYPE": "int8"})
        check(recap[node.name]["changed"] and not again[node.name]["changed"], "not idempotent")
        node.run(f"systemctl restart {PREWARM}")
        node.until(node.scores, "the host serves")
        check('"dtype":"int8"' in node.journal(since="-1min"), "the host does not serve int8")
        memory = int(node.show(HOST, "MemoryCurrent")["MemoryCurrent"]) >> 20
        self.say(f"  no torch, cache mounted read-only, int8: scoring, {memory} MiB")

    def steps(self) -> list[Callable[[], None]]:
        """In the order in which they stand above."""
        full = ("step_full_installation_prewarms_int8_under_its_hardening", "step_a_light_node_serves_from_a_read_only_cache")
        names = [name for name in vars(Walk) if name.startswith("step_") and (self.given.full or name not in full)]
        return [getattr(self, name) for name in names]


def copy_checkout(source: Path, target: Path) -> None:
    """A copy, so that work that goes on in the checkout does not change what is deployed half-way."""
    target.mkdir()
    for name in "reranker_worker reranking_server.py requirements.txt requirements-lock.txt README.md INSTALL.md CHANGELOG.md LICENSE deploy".split():
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, target)


def main() -> int:
    """Walk; 0 if every promise was kept."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.walk_node", description=__doc__, formatter_class=plain)
    parser.add_argument("--rootfs", required=True, help="a Debian 12 root file system; only read")
    parser.add_argument("--checkout", default=str(ROOT), help="what is deployed (default: this one)")
    parser.add_argument("--node-tool", default=str(ROOT.parent / "shared/tools/node.sh"), help="`up NAME PORT ROOTFS [BIND...]` and `down NAME`")
    parser.add_argument("--wheelhouse", default="", help="wheels of the light installation (default: downloaded by pip)")
    parser.add_argument("--ansible", default=shutil.which("ansible-playbook") or str(Path(sys.executable).parent / "ansible-playbook"))
    parser.add_argument("--bind", action="append", default=[], help="bind a directory read-only into the nodes, such as a local package index")
    parser.add_argument("--port", type=int, default=2300, help="the nodes' sshd listen on the three ports after this one, their hosts 100 above")
    parser.add_argument("--torch-index", default="https://download.pytorch.org/whl/cpu", help="where --full takes torch from; empty: pip's registry")
    parser.add_argument("--pip-env", action="append", default=[], metavar="NAME=VALUE", help="for pip in --full, such as PIP_FIND_LINKS=DIR")
    parser.add_argument("--full", action="store_true", help="also install torch on the second node, prewarm int8, and share it")
    parser.add_argument("--only", default="", help="deploy, then only the steps whose names this regular expression finds")
    given = parser.parse_args()
    for needed, text in ((given.node_tool, "the node tool"), (given.ansible, "ansible-playbook"), (given.rootfs, "the root file system")):
        if not Path(needed).exists():
            print(f"Skipped: {text} is not there ({needed}).")
            return 0
    with tempfile.TemporaryDirectory(prefix="walk-node-") as directory:
        return _walk(given, Path(directory))


def _walk(given: argparse.Namespace, place: Path) -> int:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / "key")], check=True)
    copy_checkout(Path(given.checkout), place / "checkout")
    given.checkout = place / "checkout"
    if not given.wheelhouse:
        given.wheelhouse = str(place / "wheels")
        lock = str(Path(given.checkout) / "requirements-lock.txt")
        command = [sys.executable, "-m", "pip", "download", "-q", "-c", lock, *LIGHT, "-d", given.wheelhouse]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    walk, failures = Walk(given, place), 0
    try:
        for node in (walk.one, walk.two):
            node.up()
        walk.say("two nodes are up: " + walk.one.run("systemctl --version | head -1; systemctl is-system-running").replace("\n", ", "))
        for step in walk.steps():
            name = step.__name__.removeprefix("step_")
            if given.only and name != "deploy_twice" and not re.search(given.only, name):
                continue
            walk.say(name.replace("_", " "))
            try:
                step()
            except (WalkError, subprocess.SubprocessError) as error:
                failures += 1
                walk.say(f"  FAILED: {error}")
    finally:
        for node in (walk.one, walk.two, walk.hand):
            if (place / "nodes" / node.name).exists():
                node.down()
    walk.say(f"{failures} promises were not kept." if failures else "Every promise was kept.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

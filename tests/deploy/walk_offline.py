"""The whole offline way, for real: make a bundle, install it on a bare Debian without any network, score there, install again, damage it.

    sudo python -m tests.deploy.walk_offline --rootfs DIR [--kind full] [--log FILE]

DIR is a root file system such as `debootstrap --variant=minbase --include=python3 bookworm DIR` makes, with the same Python version as the
one that runs this; nothing is written to it. Needs root, for namespaces and an overlay, and an environment with the whole requirements.txt,
for prewarming. Allow 5 minutes for the light bundle, 15 for the full one, and 1 or 6 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 1800
HOME = "/opt/reranker-worker"
# Mounts an overlay over the root file system, leaves the network behind, and runs a command as a newcomer's root.
_ENTER = """
set -e
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$WORK" "$NODE"
mount -t proc proc "$NODE/proc"; mount --rbind /dev "$NODE/dev"
mkdir -p "$NODE/media/stick"; mount --bind -o ro "$STICK" "$NODE/media/stick"
ip link set lo up 2>/dev/null || true
exec env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 chroot "$NODE" bash -c "$1"
"""
_PAIRS = ["Open Settings, choose Security, then Reset password.", "Bananas are rich in potassium."]
_REQUEST = json.dumps({"id": 1, "query": "how do I reset my password", "documents": _PAIRS})
_SERVE = f"""
set -a; . /etc/reranker-worker/worker.env; set +a
export HOME=/tmp/home; mkdir $HOME
printf '%s\\n' '{_REQUEST}' '{{"type":"shutdown"}}' | {HOME}/current/.venv/bin/python {HOME}/current/reranking_server.py
"""
_STATE = f"find {HOME} /var/cache/reranker-worker /etc/reranker-worker -printf '%p %T@ %C@ %i %m %u %l\\n' | LC_ALL=C sort"


class Walk:
    """A machine without a network, and the log of what was seen on it."""

    def __init__(self, rootfs: Path, scratch: Path, log: IO[str] | None) -> None:
        self._log, self.stick = log, scratch / "stick"
        places = {"LOWER": rootfs.resolve(), "UPPER": scratch / "upper", "WORK": scratch / "work", "NODE": scratch / "node", "STICK": self.stick}
        for path in places.values():
            path.mkdir(exist_ok=True)
        self._environ = {name: str(path) for name, path in places.items()} | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}

    def tell(self, text: str) -> None:
        """A line for the terminal and for the log."""
        print(text, flush=True)
        if self._log:
            self._log.write(text + "\n")
            self._log.flush()

    def on_node(self, command: str, *, expect: int = 0, show: bool = False) -> str:
        """Run a command there; its standard output and error."""
        began = time.monotonic()
        done = subprocess.run(
            ["unshare", "-m", "-p", "-f", "-u", "-i", "-n", "--propagation", "private", "bash", "-c", _ENTER, "bash", command],
            env=self._environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        shown = " ".join(command.split())[:110]
        self.tell(f"  [{time.monotonic() - began:5.1f} s, exit code {done.returncode}] {shown}")
        if show or done.returncode != expect:
            for line in done.stdout.splitlines():
                self.tell("    | " + line)
        if done.returncode != expect:
            raise SystemExit(f"walk_offline: exit code {done.returncode} where {expect} is expected.")
        return done.stdout


def main() -> None:
    """The walk."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rootfs", type=Path, required=True, metavar="DIR", help="a bare root file system with this Python version")
    parser.add_argument("--kind", choices=["light", "full"], default="light")
    parser.add_argument("--dtype", action="append", help="prewarm this precision too (as make_bundle.py)")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="a bundle that was made before")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write what was seen there too")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="a directory for what the node writes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        log = given.log.open("w", encoding="utf-8") if given.log else None
        walk(Walk(given.rootfs, Path(scratch), log), given)


def walk(node: Walk, given: argparse.Namespace) -> None:
    """Every step; the first that is not as it should be ends it."""
    bundle = node.stick / "reranker-worker.tar"
    if given.bundle:
        bundle.hardlink_to(given.bundle)
    else:
        _make(node, given, bundle)
    node.tell(f"the bundle: {bundle.stat().st_size / 1e6:,.0f} MB")
    node.tell("a machine without a network and without pip's reach")
    node.on_node("cat /etc/os-release | head -1; python3 --version; ls /sys/class/net 2>/dev/null; head -4 /proc/net/dev | tail -2", show=True)
    reach = "import socket; socket.create_connection(('192.0.2.1', 443), 3)"
    if "unreachable" not in node.on_node(f'python3 -c "{reach}"', expect=1):
        raise SystemExit("walk_offline: that machine has a network.")
    node.tell("unpacked and installed")
    node.on_node("cd /var/tmp && tar xf /media/stick/reranker-worker.tar && du -sm /var/tmp/reranker-worker-*", show=True)
    node.on_node("/var/tmp/reranker-worker-*/install.sh", show=True)
    node.on_node(f"du -smL {HOME}/current /var/cache/reranker-worker", show=True)
    node.tell("scored by the user of a host, who owns nothing of it")
    node.on_node("useradd --system --no-create-home --shell /usr/sbin/nologin jadevectordb")
    lines = node.on_node(f"runuser -u jadevectordb -- bash -c '{_quoted(_SERVE)}'", show=True).splitlines()
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    (scores,) = (answer["scores"] for answer in answers if answer.get("id") == 1)
    if scores[0] <= scores[1]:
        raise SystemExit("walk_offline: the irrelevant document came first.")
    left = node.on_node("find /tmp/home -type f")
    if left:
        # ONNX Runtime's telemetry keeps an identifier and a queue in the home directory, and sends what it gathers where there is a network.
        raise SystemExit(f"walk_offline: serving left files behind in the home directory: {left}")
    check = ".venv/bin/python -m reranker_worker check --deploy"
    node.on_node(f"set -a; . /etc/reranker-worker/worker.env; cd {HOME}/current; runuser -u jadevectordb -- {check}", show=True)
    node.tell("installed again: nothing may change")
    before = node.on_node(_STATE)
    node.on_node("/var/tmp/reranker-worker-*/install.sh")
    changed = set(node.on_node(_STATE).splitlines()) ^ set(before.splitlines())
    for line in sorted(changed):
        node.tell("    | changed: " + line)
    if changed:
        raise SystemExit("walk_offline: the second installation changed something.")
    node.tell("one byte changed: the file is named and nothing is installed")
    spoil = "f=$(ls /var/tmp/reranker-worker-*/wheels/onnxruntime-*.whl); printf x | dd of=$f bs=1 seek=1000 conv=notrunc status=none; "
    said = node.on_node(spoil + "/var/tmp/reranker-worker-*/install.sh", expect=65, show=True)
    if "wheels/onnxruntime-" not in said:
        raise SystemExit("walk_offline: the damaged file was not named.")
    node.tell("all as it should be")


def _make(node: Walk, given: argparse.Namespace, bundle: Path) -> None:
    began = time.monotonic()
    dtypes = [word for dtype in given.dtype or [] for word in ("--dtype", dtype)]
    command = [sys.executable, str(ROOT / "deploy/offline/make_bundle.py"), f"--{given.kind}", *dtypes, "--output", str(bundle)]
    subprocess.run(command, timeout=DEADLINE_S, check=True)
    node.tell(f"made in {time.monotonic() - began:.0f} s: {' '.join(command[1:])}")


def _quoted(text: str) -> str:
    return text.replace("'", "'\\''")


if __name__ == "__main__":
    main()

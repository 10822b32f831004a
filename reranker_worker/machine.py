"""What this process may use of the machine: CPUs, memory, what it holds now, and what it leaves there. Standard library only, nothing is cached.

A container's limits stand in the cgroup files, not in `os.cpu_count()`: a process that starts one thread per visible CPU under
a small quota is throttled and slower than with few threads. Every function takes the root directory, so that tests can bring their own.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_KIB = 1024
# cgroup v1 writes "no limit" as the largest multiple of the page size below 2^63; whatever is that large is no limit.
_UNLIMITED_BYTES = 1 << 60
_PR_SET_DUMPABLE = 4


def no_core_dump() -> None:
    """Forbid this process core dumps, for front and engine alike: one would hold documents."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_first() -> None:
    """Where memory runs out, be the process that the kernel ends: an engine is started again and its work sent again; the host is a database.

    To be called before `no_core_dump`: an undumpable process cannot write its own file.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may hide the file
            Path("/proc/self/oom_score_adj").write_text("1000")


def usable_threads(root: Path = Path("/")) -> int:
    """CPUs that this process may keep busy: min(affinity, ceil(cgroup quota)), at least 1."""
    quota = cpu_quota(root)
    cpus = _affinity()
    return max(1, cpus if quota is None else min(cpus, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The tightest CPU quota of this process's cgroup and all above it, in CPUs; None when there is none."""
    limits = [parse_cpu_max(text) for text in _read_each(_v2_directories(root), "cpu.max")]
    limits += [
        parse_cfs_quota(_read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")) for directory in _v1_directories(root, "cpu")
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """The tightest of the cgroup memory limits and the machine's memory, in bytes; None when neither can be read."""
    limits = [parse_memory_limit(text) for text in _read_each(_v2_directories(root), "memory.max")]
    limits += [parse_memory_limit(text) for text in _read_each(_v1_directories(root, "memory"), "memory.limit_in_bytes")]
    limits.append(_field_bytes(_read(root / "proc/meminfo"), "MemTotal:"))
    return min((limit for limit in limits if limit is not None), default=None)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that a new process may take without the system swapping, in bytes; None where the system does not tell."""
    return _field_bytes(_read(root / "proc/meminfo"), "MemAvailable:")


def current_rss_bytes(root: Path = Path("/")) -> int | None:
    """Resident memory of this process in bytes; None where the system does not tell."""
    return _field_bytes(_read(root / "proc/self/status"), "VmRSS:")


def peak_rss_bytes(root: Path = Path("/")) -> int | None:
    """The most memory this process has held at once, in bytes; None where the system does not tell."""
    peak = _field_bytes(_read(root / "proc/self/status"), "VmHWM:")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * _KIB  # macOS counts bytes, the others KiB


def may_have_accelerator(root: Path = Path("/")) -> bool:
    """Whether it is worth importing torch to look for a GPU: a driver's device stands in /dev, or this is a Mac.

    True also for Intel graphics, which most torch builds cannot use; False means that no torch build would find anything.
    """
    if sys.platform == "darwin":
        return True
    devices = [root / "dev" / name for name in ("nvidiactl", "nvidia0", "kfd", "dxg")]
    return any(path.exists() for path in devices) or any((root / "dev/dri").glob("renderD*"))


def parse_cpu_max(text: str) -> float | None:
    """CPUs granted by a cgroup v2 `cpu.max` ("QUOTA PERIOD" or "max PERIOD", microseconds); None for no limit or no sense."""
    words = text.split()
    return parse_cfs_quota(words[0], words[1] if len(words) > 1 else "100000") if words else None


def parse_cfs_quota(quota_us: str, period_us: str) -> float | None:
    """CPUs granted by cgroup v1 `cpu.cfs_quota_us` over `cpu.cfs_period_us` (-1: no limit); None for no limit or no sense."""
    try:
        quota, period = int(quota_us), int(period_us)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def parse_memory_limit(text: str) -> int | None:
    """Bytes from `memory.max` or `memory.limit_in_bytes`; None for "max", for v1's huge default and for no sense."""
    try:
        limit = int(text)
    except ValueError:
        return None
    return limit if 0 < limit < _UNLIMITED_BYTES else None


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _v2_directories(root: Path) -> Iterator[Path]:
    """This process's cgroup v2 directory and its ancestors up to the mount."""
    for hierarchy, controllers, path in _cgroups(root):
        if hierarchy == "0" and not controllers:
            # A hybrid machine mounts v2 under "unified"; there it has no controllers, so the plain mount comes first.
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                yield from _upwards(root / mount, path)


def _v1_directories(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup v1 directory for a controller and its ancestors up to the mount."""
    for _, controllers, path in _cgroups(root):
        if controller in controllers:
            for mount in dict.fromkeys((controller, ",".join(controllers))):
                yield from _upwards(root / "sys/fs/cgroup" / mount, path)


def _cgroups(root: Path) -> Iterator[tuple[str, list[str], str]]:
    """(hierarchy id, controllers, path) of each line in /proc/self/cgroup."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield parts[0], [name for name in parts[1].split(",") if name], parts[2]


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """mount/a/b, mount/a, mount for path "/a/b".

    In a container the path may be the host's and not exist below the mount; then the mount itself is the container's own group.
    """
    inside = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for depth in range(len(inside), -1, -1):
        yield mount.joinpath(*inside[:depth])


def _read_each(directories: Iterator[Path], name: str) -> Iterator[str]:
    return (text for directory in directories if (text := _read(directory / name)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _field_bytes(text: str, label: str) -> int | None:
    """The value of a "Label:   123 kB" line in bytes."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == label and words[1].isdigit():
            return int(words[1]) * _KIB
    return None

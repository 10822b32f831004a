"""CPU and memory limits, read from fake roots and from the machine that runs the tests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from reranker_worker import machine

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30

# name: (files below the root, CPU quota, memory limit)
CASES: dict[str, tuple[dict[str, str], float | None, int | None]] = {
    "no cgroup files at all": ({}, None, None),
    "v2 without limits": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"},
        None,
        None,
    ),
    "v2 with half a CPU": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5, None),
    "v2 with two and a half CPUs": (
        {"proc/self/cgroup": "0::/app\n", "sys/fs/cgroup/app/cpu.max": "250000 100000\n"},
        2.5,
        None,
    ),
    "v2 with another period": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "40000 20000\n"}, 2.0, None),
    "v2 where the parent is tighter": (
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/pod/app/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/app/memory.max": str(4 * GIB),
            "sys/fs/cgroup/pod/memory.max": str(2 * GIB),
        },
        1.5,
        2 * GIB,
    ),
    "v2 where the child is tighter": (
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/pod/app/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "max 100000\n",
        },
        1.0,
        None,
    ),
    "v2 in a container that sees the host's path": (
        {"proc/self/cgroup": "0::/../../kubepods/x\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"},
        3.0,
        None,
    ),
    "v2 cut short": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000\n"}, 2.0, None),
    "v2 with nonsense": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "lots of it\n", "sys/fs/cgroup/memory.max": "-3\n"},
        None,
        None,
    ),
    "v1 without limits": (
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        None,
        None,
    ),
    "v1 mounted under both names": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "120000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        1.2,
        None,
    ),
    "v1 nested, the parent is tighter": (
        {
            "proc/self/cgroup": "4:memory:/a/b\n3:cpu:/a/b\n",
            "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "90000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(GIB),
        },
        0.9,
        GIB,
    ),
    "v1 in a container that mounts its own group": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        2.0,
        None,
    ),
    "v1 with a period of nought": (
        {
            "proc/self/cgroup": "3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "0\n",
        },
        None,
        None,
    ),
    "hybrid: limits in v1, an empty v2": (
        {
            "proc/self/cgroup": "3:cpu:/x\n0::/x\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
        },
        1.0,
        None,
    ),
    "the machine's memory when no group limits it": ({"proc/meminfo": "MemTotal:       1048576 kB\nMemFree: 1 kB\n"}, None, GIB),
    "a group above the machine's memory": (
        {"proc/meminfo": "MemTotal: 1048576 kB\n", "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": str(8 * GIB)},
        None,
        GIB,
    ),
}


def write_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("name", CASES)
def test_limits_are_read(name: str, tmp_path: Path) -> None:
    files, quota, memory = CASES[name]
    root = write_root(tmp_path, files)
    assert machine.cpu_quota(root) == quota
    assert machine.memory_limit_bytes(root) == memory


@pytest.mark.parametrize(("cpu_max", "expected"), [("10000 100000", 1), ("100001 100000", 2), ("100000000 100000", None), ("max 1", None)])
def test_threads_are_the_smaller_of_affinity_and_quota_rounded_up(cpu_max: str, expected: int | None, tmp_path: Path) -> None:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    root = write_root(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": cpu_max})
    assert machine.usable_threads(root) == (affinity if expected is None else min(affinity, expected))


def test_threads_of_this_machine_are_at_least_one() -> None:
    assert 1 <= machine.usable_threads() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_threads_follow_the_affinity_mask(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_threads(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_rss_is_read_from_the_status_file(tmp_path: Path) -> None:
    root = write_root(tmp_path, {"proc/self/status": "Name: x\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"})
    assert machine.current_rss_bytes(root) == 1024 * 1024
    assert machine.peak_rss_bytes(root) == 2048 * 1024


def test_peak_rss_falls_back_to_getrusage(tmp_path: Path) -> None:
    assert machine.current_rss_bytes(tmp_path) is None
    peak = machine.peak_rss_bytes(tmp_path)
    assert peak is None or peak > 1 << 20


def test_this_process_holds_no_more_than_its_peak() -> None:
    current, peak = machine.current_rss_bytes(), machine.peak_rss_bytes()
    if current is not None and peak is not None:
        assert 1 << 20 < current <= peak + (1 << 20)

"""What both torch paths need of a device, without any library beside torch: which one, its threads, its memory."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from reranker_worker.backends import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

_UNFIT, _UNSAFE = 71, 78
# An accelerator should be filled.
ACCELERATOR_PASS_TOKENS = 16_384


def resolve_device(name: str) -> torch.device:
    """The torch device that `name` means; "auto" is the first of cuda, xpu, mps and cpu that is there. Raises BackendError(71, 78)."""
    present = {"cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = next(kind for kind, there in present.items() if there) if name == "auto" else name.strip().lower()
    kind, colon, number = wanted.partition(":")
    if kind not in present or (colon and not number.isdecimal()):
        raise BackendError(f"RERANKING_DEVICE={name!a} is not a device; use auto, cpu, cuda, cuda:N, xpu or mps.", _UNSAFE)
    if not present[kind]:
        there = ", ".join(other for other, here in present.items() if here)
        raise BackendError(f"The device {name!a} is not present on this machine (present: {there}); set RERANKING_DEVICE=auto.", _UNFIT)
    counted: dict[str, Callable[[], int]] = {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}
    if kind not in counted:
        return torch.device(kind)
    index, count = int(number or 0), counted[kind]()
    if index >= count:
        raise BackendError(f"The device {name!a} is not present: this machine has {count} (numbered from 0).", _UNFIT)
    return torch.device(kind, index)


def use_threads(threads: int) -> None:
    """Give torch exactly `threads` CPU threads; one pass runs at a time, so there is nothing to do between operators."""
    torch.set_num_threads(max(1, threads))
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError:
            # Can be set only before the first parallel work of a process; a second backend in one process (tests) keeps what there is.
            logging.getLogger(__name__).debug("the number of interop threads is already fixed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the device or the machine, did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def bound_shape_caches(shapes: int) -> None:
    """Keep oneDNN and torch from remembering more than `shapes` shapes, unless the user decided; nothing changes once they have worked here.

    Each keeps compiled kernels for 1,024 shapes, and texts of ever new lengths would let the engine grow for hours.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(shapes))


def release_memory(device: torch.device) -> None:
    """Give back what torch keeps of the device's memory for later, after a pass that did not fit."""
    releases = {"cuda": torch.cuda.empty_cache, "xpu": torch.xpu.empty_cache, "mps": torch.mps.empty_cache}
    release = releases.get(device.type)
    if release is not None:
        release()

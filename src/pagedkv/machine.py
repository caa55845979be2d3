"""What this machine has: cores, memory, CUDA devices; torch is not loaded to find them."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
from pathlib import Path
from typing import Any


def usable_cores() -> int:
    """Return how many cores this process may use: those that it may run on, as its container allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _cores_of_group() or cores)


@functools.cache
def _cores_of_group(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return how many whole cores' time a container grants, at least 1; None if it does not limit it."""
    try:
        folder = groups / own.read_text().strip().rpartition("::/")[2]
    except OSError:
        return None
    files = [[group / "cpu.max"] for group in (folder, *folder.parents)]
    files.append([groups / "cpu" / f"cpu.cfs_{word}_us" for word in ("quota", "period")])  # control groups, version 1
    shares = []
    for pair in files:
        try:
            quota, period = " ".join(file.read_text() for file in pair).split()
            shares += [max(1, int(quota) // int(period))] if int(quota) > 0 else []
        except (OSError, ValueError):  # no limit reads "max", or -1
            continue
    return min(shares, default=None)


def physical_memory() -> int | None:
    """Return the bytes of memory of the machine; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def free_memory(device: Any = None) -> int:
    """Return how many bytes are free on a torch device, the machine's memory by default."""
    if getattr(device, "type", "cpu") == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = [_free_of_machine(), *_free_of_group()]
    return min(free)


def _free_of_machine() -> int:
    try:
        fields = Path("/proc/meminfo").read_text().split()
        return int(fields[fields.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return (physical_memory() or 0) // 2


def _free_of_group() -> list[int]:
    """Return what a container leaves, if it limits memory."""
    try:
        group = Path("/sys/fs/cgroup")
        most, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        return [max(0, int(most) - int(used))]
    except (OSError, ValueError):  # no limit reads "max"
        return []


def give_back_unused() -> None:
    """Give back memory that only loading needed: what the C library keeps of what was freed, and code of libraries.

    Code is dropped from this process, not from the system's cache: what runs again is mapped again, 16 pages at once.
    Only glibc and Linux can be asked to.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        for start, size in _untouched_code(Path("/proc/self/smaps").read_text()):
            drop_pages(start, size)
    except (AttributeError, OSError, TypeError, ValueError):  # another C library or system; Windows has no such handle
        return


def drop_pages(start: int, size: int) -> None:
    """Let go of whole pages of a mapped file that this process has not written, or will not read."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _untouched_code(maps: str) -> list[tuple[int, int]]:
    """Return start and size in bytes of the pieces of the compiler's and torch's libraries that are as in their files.

    Their imports are over: a library that another thread is just loading may be relocated after a look at its pages.
    """
    found = []
    for piece in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE)[1:]:
        head, _, fields = piece.partition("\n")
        span, rights, *_ = head.split()
        library = re.search(r"/(llvmlite/binding|torch/lib)/[^/]*\.so[.\d]*$", head)
        if library and "w" not in rights and re.search(r"^Anonymous: +0 kB$", fields, re.MULTILINE):
            start, end = (int(word, 16) for word in span.split("-"))
            found.append((start, end - start))
    return found


def cuda_devices() -> list[str]:
    """Return the names of the GPUs; the driver itself is asked, as torch takes seconds to import."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return []
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for number in range(count.value):
        if driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceGetName(name, len(name), device):
            continue
        names.append(name.value.decode(errors="replace"))
    return names

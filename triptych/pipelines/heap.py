"""What the C library does with memory that was freed: given back to the system, or kept for later."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import suppress

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # glibc's numbers of these settings, malloc.h
OWN_PAGES = 2**16  # bytes from which a piece of memory gets pages of its own
MOST_PIECES = 2**16  # of them, glibc's own limit
NEVER_TRIM = 2**31 - 1


def return_memory(device: torch.device) -> None:
    """Hand memory that was freed back to the system; allocators keep it until they are told not to."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        with suppress(OSError, AttributeError):  # other systems than glibc's have no such call
            ctypes.CDLL(None).malloc_trim(0)


def keep_heap_small(device: torch.device) -> None:
    """From now on, freed maps and weights of a CPU go back to the system at once, in the whole process.

    Where weights are widened block by block, large pieces of many sizes come and go. glibc learns to keep
    them for later, between others that stay, and the heap grows past what is used by half and more: a LoRA's
    step on the 1B took 4.5 GiB in place of 3.0. Fresh pages cost little beside a wide block's arithmetic.
    """
    tell_heap(device, {MMAP_MAX: MOST_PIECES, MMAP_THRESHOLD: OWN_PAGES, TRIM_THRESHOLD: 0})


def keep_heap_warm(device: torch.device) -> None:
    """From now on, freed maps of a CPU stay in the process, where the next ones of their size take them.

    Otherwise every map of more than 32 MiB gets fresh pages from the system, one by one, at every update: a
    third of the time of a small network, where processors multiply in bfloat16.
    """
    tell_heap(device, {MMAP_MAX: 0, TRIM_THRESHOLD: NEVER_TRIM})


def tell_heap(device: torch.device, settings: Mapping[int, int]) -> None:
    """Change settings of the C library's heap, where there is a CPU whose library has them."""
    if device.type == "cpu":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            for number, value in settings.items():
                library.mallopt(number, value)

"""glibc's allocator, told to keep memory instead of giving it back to the system.

Plain PyTorch on a CPU allocates and frees arrays of many megabytes for each operator. By default
glibc maps and unmaps each of them, and the page faults bound eager attention; with freed memory
kept, torchvision's swin3d_t forward took less than half the time.
"""

import ctypes
import platform

# Parameters of mallopt(3), from malloc.h, and how many bytes stay pooled.
M_TRIM_THRESHOLD, TRIM_BYTES = -1, 2**31 - 1
M_MMAP_THRESHOLD, MMAP_BYTES = -3, 2**30


def set_allocator(word: str) -> str:
    """Set the allocator state named by `word`, "pooled" or "default", and return a sentence on it.

    Only glibc has these switches; elsewhere, and with "default", nothing is changed.
    """
    if word == "default":
        return "allocator: default"
    if platform.libc_ver()[0] != "glibc":
        return "allocator: default (pooling needs glibc)"
    mallopt = ctypes.CDLL(None).mallopt
    taken = mallopt(M_MMAP_THRESHOLD, MMAP_BYTES) and mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
    if not taken:
        return "allocator: default (mallopt refused the thresholds)"
    return "allocator: pooled (freed memory is kept; --allocator default undoes it)"

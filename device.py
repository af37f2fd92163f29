"""What the machine gives to the engine: a device, memory, threads, a compiler, and no interrupt at a bad moment.

Nothing here is about inference; a first reading may skip it. Import this file before torch: how threads wait is
decided when torch is loaded.
"""

from __future__ import annotations

import _signal   # `signal` without its detour through enums, a tenth of all bookkeeping
import ctypes
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from functools import wraps

# PyTorch's threads (OpenMP) wait for each other by spinning: on a core that another process has, for its whole time
# slice. So they spin for about as long as a short operation takes, and then sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Large tensors lie in pages of 2 MiB where the kernel has them: a pool of 4 KiB pages waits for address translation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import torch

# Without a GPU kernels run in Triton's interpreter, which must be chosen before anybody imports Triton.
if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
KERNELS, TRITON = [], None   # functions that are to become kernels; the package, once it is loaded


def jit(function):
    """Mark a function for triton.jit, which takes a while to import and waits until a kernel is wanted. Its file has
    `triton`, `tl` and INTERPRETED, and the kernel in the function's place, after `load_triton`."""
    KERNELS.append(function)
    return function


def load_triton():
    """Import Triton and make kernels of the functions marked @jit. None if there is no Triton for this platform
    (macOS): everything but attention="triton" works."""
    global TRITON
    if KERNELS:
        try:
            import triton
            import triton.language as tl
        except ImportError:
            return None
        for function in KERNELS:   # index tensors are views at any offset: that must not compile a kernel anew
            kernel = triton.jit(function, do_not_specialize_on_alignment=[
                "tables_ptr", "query_starts_ptr", "kv_lens_ptr", "slots_ptr"])
            function.__globals__.update({function.__name__: kernel, "triton": triton, "tl": tl,
                                         "INTERPRETED": not isinstance(tl.zeros, triton.JITFunction)})
        KERNELS.clear()
        TRITON = triton
    return TRITON


def find_device(name: str) -> torch.device:
    """The device by name. Raises ValueError if it does not exist here."""
    there = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if "cuda" in there else "cpu"
    if str(name) not in there:
        raise ValueError(f"PyTorch finds no device {str(name)!r} here: use auto, {', '.join(there)}")
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:   # Triton and CUDA graphs launch on the current device
        torch.cuda.set_device(device)
    return device


def memory_for_pool(device: torch.device) -> tuple[int, int]:
    """Bytes that a KV pool may take, and bytes that it takes unless more are asked for: 80% of what is free on a GPU;
    elsewhere all of RAM, and a quarter of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()   # what PyTorch keeps of engines that are gone
        free = int(torch.cuda.mem_get_info(device)[0] * 0.8)
        return free, free
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
    return memory, memory // 4


def keep_freed_memory(keep: bool):
    """Whether glibc keeps what is freed. While weights are read it should not: what lies between them would be lost.
    While steps run it should: given back, it would cost the next step a page fault per 4 KiB (a quarter of GPT-2's
    prefill where this was measured)."""
    with suppress(OSError, AttributeError, TypeError):   # another C library has no such function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20 if keep else 1 << 20)       # M_MMAP_THRESHOLD: what is smaller comes from the heap
        mallopt(-1, 2 ** 31 - 1 if keep else 1 << 17)    # M_TRIM_THRESHOLD: the heap shrinks if so much is free


@contextmanager
def single_thread(wanted: bool):
    """One thread inside, where the work is too little for several: they would wait for each other most of the time."""
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def uninterrupted(method):
    """Ctrl-C during a call waits until the call is over and the books are in order."""
    @wraps(method)
    def call(*arguments, **named):
        handler, caught = _signal.getsignal(signal.SIGINT), []
        if not callable(handler) or threading.current_thread() is not threading.main_thread():
            return method(*arguments, **named)
        _signal.signal(signal.SIGINT, lambda *what: caught.append(what))
        try:
            return method(*arguments, **named)
        finally:
            _signal.signal(signal.SIGINT, handler)
            if caught:
                handler(*caught[0])
    return call

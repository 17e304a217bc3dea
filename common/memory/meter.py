"""The one meter of peak memory: of the GPU, else of this process."""

import contextlib
import ctypes
import gc
import threading
from pathlib import Path

import psutil
import torch

SELF = Path("/proc/self")


def resident_bytes() -> int:
    """Memory of this process now."""
    return psutil.Process().memory_info().rss


class PeakMemory:
    """The peak of memory since a block began, in bytes; `held` is what was in use then.

    Of the GPU where there is one, else of this process: Linux keeps its peak, and elsewhere a
    thread looks every 2 ms. `peak` can be read inside the block and after it. Blocks do not nest.
    """

    def __enter__(self) -> "PeakMemory":
        self.cuda, self.ended, self.thread = torch.cuda.is_available(), threading.Event(), None
        self.held = torch.cuda.memory_allocated() if self.cuda else resident_bytes()
        self._peak = self.held
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return self
        try:
            (SELF / "clear_refs").write_text("5")  # the kernel's peak becomes the present size
        except OSError:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    @property
    def peak(self) -> int:
        if not self.ended.is_set():
            self._peak = max(self._peak, self._measured())
        return self._peak

    def _measured(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if self.thread:
            return resident_bytes()
        lines = (SELF / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def _watch(self) -> None:
        while not self.ended.wait(0.002):
            self._peak = max(self._peak, resident_bytes())

    def __exit__(self, *_) -> None:
        self._peak = self.peak
        self.ended.set()
        if self.thread:
            self.thread.join()


def give_back() -> None:
    """Returns freed memory to the system, as far as the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def bytes_of(tensors) -> int:
    """Bytes of some tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

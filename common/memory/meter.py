"""The one meter of peak memory: of the GPU, else of this process."""

import contextlib
import ctypes
import gc
import threading
import time

import psutil
import torch


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


class PeakMemory:
    """The peak of memory while a block runs: of the GPU, else this process's resident set, sampled
    every 2 ms.
    """

    def __enter__(self) -> "PeakMemory":
        self.peak, self.running = 0, True
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.002)

    def __exit__(self, *_) -> None:
        self.running = False
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.thread.join()


def give_back() -> None:
    """Returns freed memory to the system, as far as the C library can: building the model must not
    be counted.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

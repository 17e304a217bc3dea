"""The machine that a measurement was made on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil

from common.environment import nvidia_gpus


def describe_machine() -> dict:
    """What a measured time depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "trl")
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": nvidia_gpus(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }

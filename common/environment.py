"""Is this machine ready for the labs? `python -m common.environment` prints one line per check.

A line is OK, NOTE (good to know) or FIX (after the colon: what to do). With a FIX the exit status
is 1.
"""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from common import profiles
from common.io.pretrained import PACKAGED, model_folder

Line = tuple[str, str]
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
TESTED = REQUIREMENTS.with_name("constraints.txt")
# GB of memory and of disk that all notebooks need (estimates). They leave about 30 models: 0.5 GB
# each for GPT-2, 2 GB for Qwen2.5-0.5B in float32. A 7B model takes 14.5 GB in 16 bit: in memory
# once, while an adapter is merged; on disk for the hub's copy and for seven stages. The sweeps
# leave only adapters.
ROOM = {
    "smoke": (2, 1),
    "cpu": (3, 2),
    "smollm": (8, 12),
    "gpt2": (7, 15),
    "qwen-0.5b": (9, 70),
    "qlora-7b": (20, 130),
}


def python_line(version: tuple[int, ...] = sys.version_info[:3]) -> Line:
    """Is this Python new enough?"""
    text = "Python " + ".".join(map(str, version))
    remedy = "install Python 3.11 or newer, make .venv anew"
    return ("OK", text) if version >= (3, 11) else ("FIX", f"{text}: {remedy}")


def read_pins(path: Path = REQUIREMENTS) -> dict[str, str]:
    """Package name → pinned version, from a file or else from the installed `common`."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        lines = [line for line in metadata.requires("common") or [] if "extra ==" not in line]
    found = [re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def installed(name: str) -> str | None:
    """The version of a package without its build label (2.13.0+cpu is 2.13.0), or None."""
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def package_lines(pins: dict[str, str]) -> list[Line]:
    """Is every pinned package installed in that version, and the course's own package too?"""
    lines = []
    if not pins:
        lines.append(("FIX", "no pinned versions found: run this in the repository's folder"))
    for name, pin in pins.items():
        version = installed(name)
        text = f"{name} {version}" if version else f"{name} is not installed"
        remedy = f'the labs are pinned to {pin}: python -m pip install "{name}=={pin}"'
        lines.append(("OK", text) if version == pin else ("FIX", f"{text}, {remedy}"))
    if not installed("common"):
        lines.append(("FIX", "the notebooks cannot import common: python -m pip install -e ."))
    return lines


def moved_lines(tested: dict[str, str]) -> list[Line]:
    """Packages that others bring along, and that are not the version that was tested."""
    versions = {name: installed(name) for name in tested}
    moved = [f"{name} {has}" for name, has in versions.items() if has not in (None, tested[name])]
    shown = ", ".join(moved[:5]) + (", …" if len(moved) > 5 else "")
    remedy = "python -m pip install -c constraints.txt -r requirements.txt"
    text = f"not the version that was tested: {shown}; to get it: {remedy}"
    return [("NOTE", text)] if moved else []


def nvidia_gpus() -> list[str]:
    """The NVIDIA GPUs that the driver reports. torch is not asked: it may be the wrong build."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True)
        if answer.returncode == 0:
            return answer.stdout.strip().splitlines()
    folders = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    return [f"NVIDIA GPU at {folder.name}" for folder in folders]


def cuda_package_bytes() -> int:
    """Disk space of the CUDA packages that pip installs beside a CUDA build of torch."""
    found = metadata.distributions()
    packages = [dist for dist in found if re.match(r"nvidia-|triton$", dist.name or "")]
    return sum(file.size or 0 for dist in packages for file in dist.files or [])


def torch_line(gpus: list[str], cuda: str | None, usable: bool, cuda_bytes: int) -> Line:
    """Does this build of torch fit the machine?

    Args: `cuda` is torch.version.cuda, `usable` is torch.cuda.is_available().
    """
    here = ", ".join(gpus) or ("a GPU that torch can use" if usable else "no NVIDIA GPU")
    build = "build of the same torch version; 'Get started' on the PyTorch site gives the command"
    if gpus and not cuda:
        return "FIX", f"{here}, but this torch is built for CPUs only: install the CUDA {build}"
    if gpus and not usable:
        return "FIX", f"{here}, but torch (CUDA {cuda}) cannot use it: update the NVIDIA driver"
    if not usable and (cuda or cuda_bytes > 1e9):
        size = f"{cuda_bytes / 1e9:.1f} GB of CUDA packages (the labs run; to free the space)"
        remedy = f"make .venv anew, and in it install first the CPU {build}"
        return "FIX", f"{here}, but {size}: {remedy}"
    return "OK", f"{here}, and torch is built for {f'CUDA {cuda}' if cuda else 'CPU'}"


def profile_lines(profile: profiles.Profile, device: str, dtype: str, why: str) -> list[Line]:
    """Which device, precision and profile the labs will use, and whether they fit each other."""
    lines = [("OK", f"device {device}, precision {dtype} ({why})")]
    if device == "cpu" and profile.four_bit:
        lines.append(("FIX", f"profile {profile.name} needs a CUDA GPU: set LAB_PROFILE=cpu"))
    elif device == "cpu" and profile.name not in ("smoke", "cpu", "smollm"):
        lines.append(("NOTE", f"profile {profile.name} is made for a GPU and slow without one"))
    if profile.model in PACKAGED and not (model_folder(profile.model) / "README.md").exists():
        lines.append(("FIX", f"the model {profile.model} is not here yet: make model"))
    folder = profile.folder
    if folder.is_relative_to(profiles.ROOT):
        folder = folder.relative_to(profiles.ROOT)
    text = f"profile {profile.name} ({profile.reason}); its runs go to {folder.as_posix()}"
    return [*lines, ("OK", text)]


def room_lines(profile: profiles.Profile, memory_bytes: int, free_bytes: int) -> list[Line]:
    """Is there enough memory and disk for a profile?"""
    memory, disk = ROOM[profile.name]
    smaller, other = "choose a smaller LAB_PROFILE", "free some, or set LAB_RUNS to a larger disk"
    lines = []
    for what, has, needs, remedy in (
        ("memory", memory_bytes / 1e9, memory, smaller),
        ("free disk", free_bytes / 1e9, disk, other),
    ):
        text = f"{has:.1f} GB of {what}; profile {profile.name} asks for {needs} GB"
        lines.append(("OK", text) if has >= needs else ("FIX", f"{text}: {remedy}"))
    return lines


def all_lines() -> list[Line]:
    """Every check of this machine, as far as it can go."""
    pins, tested = read_pins(), read_pins(TESTED)
    lines = [python_line(), *package_lines(pins)]
    lines += moved_lines({name: tested[name] for name in tested if name not in pins})
    try:
        import psutil
        import torch

        profile = profiles.get_profile()
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is not there
        return [*lines, ("FIX", f"{error}: install what is named above, then check again")]
    except ValueError as error:
        return [*lines, ("FIX", f"{error} The profile is unknown: correct or unset LAB_PROFILE")]
    build = torch.version.cuda, torch.cuda.is_available()
    place = next(place for place in (profile.folder.absolute() / "sft").parents if place.exists())
    return [
        *lines,
        torch_line(nvidia_gpus(), *build, cuda_package_bytes()),
        *profile_lines(profile, *profiles.device_and_precision(profile)),
        *room_lines(profile, psutil.virtual_memory().total, shutil.disk_usage(place).free),
    ]


def main() -> int:
    lines = all_lines()
    for status, text in lines:
        print(f"{status:4}  {text}")
    fixes = sum(status == "FIX" for status, _ in lines)
    print(f"\n{fixes} to fix." if fixes else "\nReady.")
    return 1 if fixes else 0


if __name__ == "__main__":
    sys.exit(main())

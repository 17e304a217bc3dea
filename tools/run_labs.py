"""Runs the notebooks of the course in order: `python -m tools.run_labs`, which `make labs` calls.

With `--deep-dives` those of the labs' folders `deep-dives/` run too, after the main ones.
Executed copies go to `<run folder>/notebooks/`. The first notebook that fails ends the run: its
name, the cell and the error are printed, what ran is kept, and the exit status is 1. `timing.json`
beside the copies holds two measures of each notebook: the wall seconds from kernel start to last
cell, and the peak resident memory of the kernel process. Linux and Windows keep this peak; on macOS
it is the largest of two samples a second. GPU memory and child processes are not in it.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from copy import deepcopy
from pathlib import Path

import nbformat
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.filters import strip_ansi
from tqdm import tqdm

from common.io.files import write_json
from common.profiles import ROOT, Profile, get_profile
from tools.machine import describe_machine
from tools.readme_table import DEEP_DIVES, label_of, timing_text
from tools.results_table import results_table
from tools.tables import RESULTS_FOLDER


class LabFailed(Exception):
    """A notebook did not run to its end; the message says where and why."""


def peak_memory(pid: int) -> int:
    """The largest resident size of a process so far, in bytes; on macOS its present size."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():  # Linux
        lines = status.read_text().splitlines()
        peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(peaks[0]) * 1024 if peaks else 0
    memory = psutil.Process(pid).memory_info()
    return getattr(memory, "peak_wset", memory.rss)  # Windows, macOS


def what_happened(error: BaseException, kernel: subprocess.Popen | None, peak: int) -> str:
    """Why a notebook did not run to its end. `peak`: the bytes of memory that its kernel held."""
    if isinstance(error, KeyboardInterrupt):
        return "It was stopped from outside (Ctrl-C, or a signal to this program)."
    if not isinstance(error, DeadKernelError) or kernel is None:
        return f"{type(error).__name__}: {error}"
    status = kernel.wait()
    if status >= 0:
        return f"The kernel's process ended by itself, with exit status {status}."
    text = f"The kernel's process was killed by {signal.Signals(-status).name}."
    if status == -signal.SIGKILL:
        here = psutil.virtual_memory().total / 1e9
        text += f" The system does this when memory runs out: it held {peak / 1e9:.1f} GB of "
        text += f"{here:.1f} GB. Close other programs, or choose a smaller LAB_PROFILE."
    return text


def run_notebook(notebook: nbformat.NotebookNode, folder: Path, label: str) -> dict[str, float]:
    """Executes a notebook in `folder` with this Python. The outputs are in `notebook` afterwards.

    Returns: {"wall_seconds", "peak_memory_bytes"}. Raises: LabFailed.
    """
    total = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
    layout = "{desc}  cell {n_fmt}/{total_fmt}  {elapsed}"
    bar = tqdm(desc=label, total=total, bar_format=layout, disable=None, leave=False)
    cells, kernels, peaks = ["(the kernel did not start)"], [None], [0]
    specs = KernelSpecManager(kernel_dirs=[])  # with none installed, the kernel is this very Python
    manager = AsyncKernelManager(kernel_spec_manager=specs, transport_encryption="auto")

    def begin(cell, **_):
        cells.append(cell.source)
        kernels.append(manager.provisioner.process)
        bar.update()

    def sample(**_):
        with contextlib.suppress(AttributeError, OSError, psutil.Error):  # there is no kernel
            peaks.append(peak_memory(kernels[-1].pid))

    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, km=manager, resources=place, coalesce_streams=True)
    client.record_timing, client.on_cell_execute, client.on_cell_executed = False, begin, sample
    start = time.perf_counter()
    # In a thread of its own: in the main thread, the client takes Ctrl-C for itself.
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(client.execute, cleanup_kc=True)
        try:
            while not wait([run], timeout=0.5).done:
                sample()
                bar.refresh()  # the clock goes on during a long cell
            run.result()
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and kernels[-1]:
                kernels[-1].kill()  # and so ends the thread
            reason = f"{cells[-1]}\n\n{what_happened(error, kernels[-1], max(peaks))}"
            if isinstance(error, CellExecutionError):
                reason = strip_ansi(str(error))  # holds the source too
            raise LabFailed(
                f"{label} failed in cell {len(cells) - 1}/{total}.\n{reason}"
            ) from error
        finally:
            bar.close()
    return {"wall_seconds": round(time.perf_counter() - start, 1), "peak_memory_bytes": max(peaks)}


def name_of(notebook: Path) -> str:
    """`Lab-…/01-….ipynb` or `Lab-…/deep-dives/01-….ipynb`."""
    folders = 3 if notebook.parent.name == DEEP_DIVES else 2
    return "/".join(notebook.parts[-folders:])


def run_all(notebooks: list[Path], folder: Path, in_place: bool = False) -> dict[str, dict]:
    """Runs notebooks in order, their copies in `folder`.

    Returns: {notebook, as lab/file or lab/deep-dives/file: timing}. Raises: LabFailed.
    """
    timings = {}
    for number, source in enumerate(notebooks, 1):
        name = name_of(source)
        label = f"[{number}/{len(notebooks)}] {label_of(name)}"
        notebook, copy = nbformat.read(source, nbformat.NO_CONVERT), folder / name
        metadata = deepcopy(notebook.metadata)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            timing = run_notebook(notebook, source.parent, label)
        except LabFailed as error:
            raise LabFailed(f"{error}\nWhat ran is kept in {copy}") from error
        finally:
            nbformat.write(notebook, copy)
        if in_place:
            # without the kernel's exact version and the state of widgets
            notebook.metadata = metadata
            if json.dumps(str(ROOT))[1:-1] in nbformat.writes(notebook):
                raise LabFailed(f"{label} prints a path of this machine, {ROOT}: see {copy}")
            nbformat.write(notebook, source)
        timings[name] = timing
        print(f"{label}  {timing_text(timing)}", flush=True)
    return timings


def record(path: Path, profile: Profile, content: dict) -> None:
    """Puts what one profile measured into a results file, beside that of the others."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**recorded, profile.run_name: content})


def old_runs(profile: Profile, seed: int) -> list[Path]:
    """What a run of all notebooks with a seed would find: its stages, and those of its next seeds.

    The comparison of methods trains the next seeds too. The folders of all other seeds stay.
    """
    here = profile.folder.absolute()
    inside = here / f"seed-{seed}" if seed else here
    stages = [path for path in inside.glob("*") if not path.name.startswith("seed-")]
    seeds = [here / f"seed-{seed + k}" for k in range(1, profile.seeds)]
    return stages + [path for path in seeds if path.exists()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks of the course in order.")
    add = parser.add_argument
    add("parts", nargs="*", help="only notebooks with one of these in their path: Lab-1.7, 02-")
    add("--deep-dives", action="store_true", help="run the deep dives too, after the others")
    add("--in-place", action="store_true", help="write outputs into the notebooks themselves too")
    add("--fresh", action="store_true", help="remove the profile's run folder first")
    add("--record", action="store_true", help="keep the times in notebooks.json")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # a Windows console may not know every character
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    os.environ.pop(
        "MPLBACKEND", None
    )  # a kernel shows its figures inline unless this says otherwise
    for name in ("LAB_RUNS", "LAB_MODEL", "LAB_DATA", "LAB_SFT_DATA"):
        # may hold a path; kernels run in other folders than this script
        value = os.environ.get(name)
        if value and (name == "LAB_RUNS" or Path(value).exists()):
            os.environ[name] = str(Path(value).resolve())
    everything = [
        *sorted(ROOT.glob("Lab-*/*.ipynb")),
        *sorted(ROOT.glob(f"Lab-*/{DEEP_DIVES}/*.ipynb")),
    ]
    parts = options.parts or ["Lab-"]
    dive = options.deep_dives or any(DEEP_DIVES in part for part in parts)
    notebooks = [
        path
        for path in everything
        if any(part in name_of(path) for part in parts) and (dive or DEEP_DIVES not in path.parts)
    ]
    if not notebooks:
        sys.exit(f"No notebook found in {ROOT} with {' or '.join(parts)} in its path.")
    try:
        profile = get_profile()
    except ValueError as error:
        sys.exit(str(error))
    seed = int(os.environ.get("LAB_SEED") or 0)
    folder = profile.folder.absolute() / (f"seed-{seed}" if seed else "")
    old = old_runs(profile, seed)
    main_ones = {path for path in everything if DEEP_DIVES not in path.parts}
    if options.record and (not main_ones <= set(notebooks) or (old and not options.fresh)):
        sys.exit(
            "Times are kept for all main notebooks from nothing: add --fresh, name no notebooks."
        )
    if options.fresh and old:
        print(f"Starting from nothing: removing the runs in {folder}")
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{len(notebooks)} notebooks, profile {profile.name} ({profile.reason}), in {folder}")
    try:
        timings = run_all(notebooks, folder / "notebooks", options.in_place)
    except LabFailed as error:
        sys.exit(f"\n{error}")
    content = {"machine": describe_machine(), "notebooks": timings}
    write_json(folder / "notebooks" / "timing.json", content)
    if options.record:
        record(RESULTS_FOLDER / "notebooks.json", profile, content)
        # tables of the READMEs are made from 1.8-03's, and 1.8-04 shows that of a real model
        for name in ("comparison", "deployment"):
            report = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            record(RESULTS_FOLDER / f"{name}.json", profile, report)
    print(f"\n{results_table(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the notebooks of the course in order: `python tools/run_labs.py`, which is what `make labs`
does.

Executed copies go to `<run folder>/notebooks/`. The first notebook that fails ends the run: its
name, the cell and the error are printed, what ran is kept, and the exit status is 1. `timing.json`
beside the copies holds for each notebook the wall seconds from kernel start to last cell, and the
peak resident memory of the kernel process: the peak that Linux and Windows keep, on macOS the
largest of two samples a second. GPU memory and child processes are not in it.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert.filters import strip_ansi
from tqdm import tqdm

from common.profiles import get_profile
from tools.machine import describe_machine
from tools.readme_table import timing_text
from tools.results_table import results_table
from tools.tables import RESULTS_FOLDER

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ("comparison.json",)  # of the notebooks, kept beside the times


class LabFailed(Exception):
    """A notebook did not run to its end; the message says where and why."""


def peak_memory(pid: int) -> int:
    """The largest resident size of a process so far, in bytes; on macOS its present size."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():  # Linux
        peaks = [
            line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")
        ]
        return int(peaks[0]) * 1024 if peaks else 0
    memory = psutil.Process(pid).memory_info()
    return getattr(memory, "peak_wset", memory.rss)  # Windows, macOS


def run_notebook(notebook: nbformat.NotebookNode, folder: Path, label: str) -> dict[str, float]:
    """Executes a notebook in `folder` with this Python. Its outputs are in it afterwards, complete
    or not.

    Returns: {"wall_seconds", "peak_memory_bytes"}. Raises: LabFailed.
    """
    total = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
    layout = "{desc}  cell {n_fmt}/{total_fmt}  {elapsed}"
    bar = tqdm(desc=label, total=total, bar_format=layout, disable=None, leave=False)
    started, peaks, ended = [], [0], threading.Event()
    specs = KernelSpecManager(kernel_dirs=[])  # with none installed, the kernel is this very Python
    manager = AsyncKernelManager(kernel_spec_manager=specs, transport_encryption="auto")

    def begin(cell, **_):
        started.append(cell)
        bar.update()

    def sample(**_):
        pid = getattr(
            manager.provisioner, "pid", None
        )  # None before the kernel starts and after it ended
        with contextlib.suppress(OSError, psutil.Error):
            peaks.append(peak_memory(pid) if pid else 0)

    def watch():
        while not ended.wait(0.5):
            sample()
            bar.refresh()  # the clock goes on during a long cell

    client = NotebookClient(
        notebook,
        km=manager,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=begin,
        on_cell_executed=sample,
        resources={"metadata": {"path": str(folder)}},
    )
    watcher, start = threading.Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    try:
        client.execute(cleanup_kc=True)
    except Exception as error:
        source = started[-1].source if started else "(the kernel did not start)"
        reason = f"{source}\n\n{type(error).__name__}: {error}"
        if isinstance(error, CellExecutionError):
            reason = strip_ansi(str(error))  # holds the source too
        raise LabFailed(f"{label} failed in cell {len(started)}/{total}.\n{reason}") from error
    finally:
        ended.set()
        watcher.join()
        bar.close()
    return {"wall_seconds": round(time.perf_counter() - start, 1), "peak_memory_bytes": max(peaks)}


def run_all(
    notebooks: list[Path], folder: Path, in_place: bool = False
) -> dict[str, dict[str, float]]:
    """Runs notebooks in order, copies in `folder`. Returns: {notebook: timing}. Raises: LabFailed."""
    timings = {}
    for number, source in enumerate(notebooks, 1):
        lab = source.parent.name
        label = f"[{number}/{len(notebooks)}] {'-'.join(lab.split('-')[:2])} {source.stem}"
        notebook, copy = nbformat.read(source, nbformat.NO_CONVERT), folder / lab / source.name
        metadata = nbformat.from_dict(json.loads(json.dumps(notebook.metadata)))
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            timing = run_notebook(notebook, source.parent, label)
        except LabFailed as error:
            raise LabFailed(f"{error}\nWhat ran is kept in {copy}") from error
        finally:
            nbformat.write(notebook, copy)
        if in_place:
            notebook.metadata = (
                metadata  # without the kernel's exact version and the state of widgets
            )
            if json.dumps(str(ROOT))[1:-1] in nbformat.writes(notebook):
                raise LabFailed(f"{label} prints a path of this machine, {ROOT}: see {copy}")
            nbformat.write(notebook, source)
        timings[f"{lab}/{source.name}"] = timing
        print(f"{label}  {timing_text(timing)}", flush=True)
    return timings


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def record(path: Path, profile: str, content: dict) -> None:
    """Puts what one profile measured into a results file, beside that of the others."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**recorded, profile: content})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the notebooks of the course in order.")
    parser.add_argument(
        "parts", nargs="*", help="only notebooks with one of these in their path: Lab-1.7, 02-"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="write outputs into the notebooks themselves too"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="remove the profile's run folder first"
    )
    parser.add_argument("--record", action="store_true", help="keep the times in notebooks.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.stdout.reconfigure(errors="replace")  # a Windows console may not know every character
    os.environ.pop(
        "MPLBACKEND", None
    )  # a kernel shows its figures inline unless this says otherwise
    for name in (
        "LAB_RUNS",
        "LAB_MODEL",
        "LAB_DATA",
        "LAB_SFT_DATA",
    ):  # kernels run in other folders than this script
        value = os.environ.get(name)
        if value and (name == "LAB_RUNS" or Path(value).exists()):
            os.environ[name] = str(Path(value).resolve())
    found = sorted(ROOT.glob("Lab-*/*.ipynb"))
    parts = options.parts or ["Lab-"]
    notebooks = [
        path for path in found if any(part in path.relative_to(ROOT).as_posix() for part in parts)
    ]
    if not notebooks:
        sys.exit(f"No notebook found in {ROOT} with {' or '.join(parts)} in its path.")
    try:
        profile = get_profile()
    except ValueError as error:
        sys.exit(str(error))
    folder = profile.folder.absolute()
    seed = int(os.environ.get("LAB_SEED") or 0)
    folder = folder / f"seed-{seed}" if seed else folder
    # The comparison of methods trains the next seeds too, in folders of their own in here; still
    # other seeds stay.
    ours = {f"seed-{seed + k}" for k in range(1, profile.seeds)}
    old = [path for path in folder.glob("*") if not path.name.startswith("seed-")]
    old += [path for path in profile.folder.absolute().glob("seed-*") if path.name in ours]
    if options.fresh and old:
        print(f"Starting from nothing: removing the runs in {folder}")
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        old = []
    if options.record and (old or notebooks != found):
        sys.exit(
            "Times are recorded for all notebooks from nothing: add --fresh, and name no notebooks."
        )

    print(
        f"{len(notebooks)} notebooks, profile {profile.name} ({profile.reason}), results in {folder}",
        flush=True,
    )
    try:
        timings = run_all(notebooks, folder / "notebooks", options.in_place)
    except LabFailed as error:
        sys.exit(f"\n{error}")
    content = {"machine": describe_machine(), "notebooks": timings}
    write_json(folder / "notebooks" / "timing.json", content)
    if options.record:
        record(RESULTS_FOLDER / "notebooks.json", profile.run_name, content)
        for name in REPORTS:  # the tables of the READMEs are made from these
            record(
                RESULTS_FOLDER / name,
                profile.run_name,
                json.loads((folder / name).read_text(encoding="utf-8")),
            )
    print(f"\n{results_table(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

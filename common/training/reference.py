"""Reference log-probabilities, computed once before training and kept as two columns beside the
pairs.
"""

import hashlib
import json
import math
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.evaluation import logps_of
from common.io.files import write_json
from common.io.fingerprints import digest, source_digest, versions
from common.logprobs import PairLogps, SideLogps
from common.packed import PATHS
from common.training.checkpoints import whole
from common.training.processes import of_all, of_main, place
from common.training.task import Task

REFERENCE_COLUMNS = {"chosen": "reference_chosen_logps", "rejected": "reference_rejected_logps"}


def weights_digest(model) -> str:
    """Fingerprint of a model's weights, those of a LoRA adapter left out: with the adapter off they
    do not count.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            found.update(
                whole(weight).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            )
    return found.hexdigest()[:16]


def reference_columns(
    task: Task, model, path: str, show: bool = True
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Summed log-probabilities of the task's rows under a frozen reference, in nats.

    They are read from the file of an earlier run, or computed. The file is named after the model's
    weights, the rows' token ids, path and precision, versions and code: where any of them changes
    it is computed again, and a sweep over the loss computes it once for all its runs. Of several
    processes each computes its share, and all get all of it.
    Returns: ({column: one value per row}, cost). The cost is what the computation took when it was
        made: seconds `wall` and `cpu` of the first process, and `reference_flops` of all.
    Raises: OSError as `write_json`.
    """
    rows = task.rows
    tokens = [[row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")] for row in rows]
    key = {
        "model": weights_digest(model),
        "data": digest(tokens),
        "path": path,
        "precision": task.precision,
        "versions": versions(),
        "source": source_digest(),
    }
    file = task.shared / "reference" / f"{digest(key)}.json"
    process, processes = place()
    saved = None
    if not process and file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
    title = f"reference log-probabilities of {len(rows)} pairs"
    if saved := of_main(saved):
        if show:
            print(f"{title}: read, computed before in {saved['cost']['wall']:.1f} s")
        return {name: saved[name] for name in REFERENCE_COLUMNS.values()}, saved["cost"]
    wall, cpu = time.perf_counter(), time.process_time()
    with FlopCounterMode(display=False) as counter:
        # As many rows for each process: under FSDP they compute in lockstep.
        mine = rows[process::processes]
        mine += rows[: math.ceil(len(rows) / processes) - len(mine)]
        logps = logps_of(model, mine, task.eval_batch, PATHS[path], "reference" if show else "")
    sums = {side: getattr(logps, side).sums.tolist() for side in REFERENCE_COLUMNS}
    columns = {name: [0.0] * len(rows) for name in REFERENCE_COLUMNS.values()}
    found = of_all((sums, counter.get_total_flops()))
    for number, (sums, _) in enumerate(found):
        for side, name in REFERENCE_COLUMNS.items():
            columns[name][number::processes] = sums[side][: len(rows[number::processes])]
    cost = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    cost["reference_flops"] = sum(flops for _, flops in found)
    if show:
        print(f"{title}: computed once, in {cost['wall']:.1f} s")
    if not process:
        write_json(file, {"key": key, "cost": cost, **columns})
    return columns, cost


def from_columns(rows: list[dict], batch: dict[str, torch.Tensor]) -> PairLogps:
    """What `response_logps` of the reference would give for a batch of these rows."""
    device = batch["prompt_ids"].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    sides = {
        side: SideLogps(
            torch.tensor([row[name] for row in rows], dtype=wide, device=device),
            batch[f"{side}_lengths"],
        )
        for side, name in REFERENCE_COLUMNS.items()
    }
    return PairLogps(**sides)

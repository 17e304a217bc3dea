"""Reference log-probabilities, computed once before training and kept as two columns beside the
pairs.
"""

import hashlib
import json
import math
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.evaluation import logps_of
from common.io.files import write_json
from common.io.fingerprints import digest, source_digest, versions
from common.logprobs import PairLogps, SideLogps
from common.profiles import device_and_precision
from common.training import held_out
from common.training.checkpoints import whole
from common.training.processes import of_all, of_main, place

COLUMNS = {"chosen": "reference_chosen_logps", "rejected": "reference_rejected_logps"}


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
    folder: Path,
    model,
    rows: list[dict],
    pad_id: int,
    batch_size: int,
    path: str,
    precision: str,
    show: bool = True,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Summed log-probabilities of all rows under a frozen reference, in nats, from the file in
    `folder` or computed.

    The file is named after the model's weights, the rows' token ids, path and precision, versions
    and the source of `common`: where any of them changes it is computed again. A sweep over the
    loss computes it once for all its runs. Of several processes each computes its share, and all
    get all of it.
    Returns: ({column: one value per row}, cost), the cost being what the computation took when it
        was made: seconds "wall" and "cpu" of the first process, and "reference_flops" of all.
        Raises: OSError as `runs.write_json`.
    """
    tokens = [[row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")] for row in rows]
    key = {
        "model": weights_digest(model),
        "data": digest(tokens),
        "path": path,
        "precision": precision,
        "versions": versions(),
        "source": source_digest(),
    }
    file = folder / "reference" / f"{digest(key)}.json"
    process, processes = place()
    if saved := of_main(
        json.loads(file.read_text(encoding="utf-8")) if not process and file.exists() else None
    ):
        if show:
            print(
                f"reference log-probabilities of {len(rows)} pairs: read, computed before in {_took(saved['cost'])}"
            )
        return {name: saved[name] for name in COLUMNS.values()}, saved["cost"]
    wall, cpu = time.perf_counter(), time.process_time()
    with FlopCounterMode(display=False) as counter:
        mine = rows[process::processes]
        mine += rows[
            : math.ceil(len(rows) / processes) - len(mine)
        ]  # as many for all: FSDP computes in lockstep
        logps = logps_of(model, mine, pad_id, batch_size, path, "reference" if show else "")
    columns = {name: [0.0] * len(rows) for name in COLUMNS.values()}
    found = of_all(
        ({side: getattr(logps, side).sums.tolist() for side in COLUMNS}, counter.get_total_flops())
    )
    for number, (sums, _) in enumerate(found):
        for side, name in COLUMNS.items():
            columns[name][number::processes] = sums[side][: len(rows[number::processes])]
    cost = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    cost["reference_flops"] = sum(flops for _, flops in found)
    if show:
        print(f"reference log-probabilities of {len(rows)} pairs: computed once, in {_took(cost)}")
    if not process:
        write_json(file, {"key": key, "cost": cost, **columns})
    return columns, cost


def cache_reference(trainer) -> None:
    """Puts the columns beside a trainer's rows, counts their cost to the run, and lets the
    reference go.

    What evaluations need of it is taken before: its log-probabilities of the held-out pairs and its
    answers. Those of answers yet to come cannot be, so the evaluations report no KL. (With LoRA
    they do: the adapter is switched off.)
    """
    lab, main = trainer.lab, trainer.accelerator.is_main_process
    precision = device_and_precision()[1]
    with trainer.as_reference() as model:
        columns, cost = reference_columns(
            lab.folder,
            model,
            trainer.rows,
            trainer.pad,
            trainer.eval_batch,
            trainer.path,
            precision,
            main,
        )
        trainer.held_out_reference = held_out.logps(trainer, model, lab.test_pairs)
        if lab.data.world:
            trainer.reference_answers = held_out.answers(trainer, model, lab.seed + 1)
    values = zip(*columns.values(), strict=True)
    trainer.rows = [
        row | dict(zip(columns, pair, strict=True))
        for row, pair in zip(trainer.rows, values, strict=True)
    ]
    trainer.state |= cost
    trainer.reference = None


def _took(cost: dict[str, float]) -> str:
    return f"{cost['wall']:.1f} s"


def from_columns(rows: list[dict], batch: dict[str, torch.Tensor]) -> PairLogps:
    """What `response_logps` of the reference would give for a batch of these rows."""
    device = batch["prompt_ids"].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    sides = {
        side: SideLogps(
            torch.tensor([row[name] for row in rows], dtype=wide, device=device),
            batch[f"{side}_lengths"],
        )
        for side, name in COLUMNS.items()
    }
    return PairLogps(**sides)

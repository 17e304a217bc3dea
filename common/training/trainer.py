"""The training loop itself: steps, held-out measures, early stopping, checkpoints and exact resume,
on Accelerate.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import get_scheduler

from common import losses, models
from common.data import collate
from common.io.files import read_metrics, write_lines
from common.judges import reward_objective
from common.lab import Lab, stage_of
from common.logprobs import PairLogps, checked_path, response_logps
from common.plots.curves import LiveFigure
from common.profiles import Recipe, device_and_precision
from common.training import checkpoints, held_out, processes
from common.training.optimizers import new_optimizer
from common.training.reference import cache_reference, from_columns
from common.training.signs import signs_of_over_optimisation


class TrainingError(RuntimeError):
    """Training that cannot go on. The message says where it stopped and what to do."""


class Trainer:
    """One run: its model, reference, optimiser and counters. `training.train` is the door to it."""

    def __init__(
        self,
        lab: Lab,
        stage: str,
        recipe: Recipe,
        rows: list[dict],
        held_out: list[dict],
        folder: Path,
    ):
        device, dtype, _ = device_and_precision()
        mixed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no")
        self.lab, self.recipe, self.rows, self.held_out, self.folder = (
            lab,
            recipe,
            rows,
            held_out,
            folder,
        )
        self.method = stage_of(stage).method
        self.stage, self.pad, self.eval_batch = (
            stage,
            lab.tokenizer.pad_token_id,
            lab.profile.eval_batch,
        )
        imitates = self.method in ("lm", "sft") or (self.method == "orpo" and recipe.lambda_or == 0)
        self.sides = (
            ("chosen",) if imitates else ("chosen", "rejected")
        )  # lambda 0 needs no rejected answers
        # Without `cpu`, processes that torchrun starts on a machine without a GPU would not find
        # each other.
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed)
        processes.check_launch(self.accelerator)
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and (lab.profile.lora or stage.endswith("_lora")):
            raise processes.LaunchError(
                "FSDP is for full fine-tuning here. LoRA fits one GPU: use torchrun."
            )
        count, batch = self.accelerator.num_processes, min(recipe.batch_size, len(rows))
        divided = processes.shares(
            count, batch, recipe.micro_batch, stage_of(stage).rows, self.sharded
        )
        if self.accelerator.is_main_process and (count > 1 or batch > recipe.micro_batch):
            print(f"{stage}: {divided}")
        self.per_epoch = max(
            1, len(rows) // recipe.batch_size
        )  # the rest is shuffled into other epochs
        self.steps = max(1, round(self.per_epoch * recipe.epochs))
        counters = (
            "step",
            "tokens",
            "reference_flops",
            "wall",
            "cpu",
            "aside",
            "peak",
            "since_best",
        )
        self.state = {
            **dict.fromkeys(counters, 0),
            "best": math.inf,
            "warnings": [],
            "stopped_early": False,
        }
        self.state |= {
            "padded": {},
            "flops_per_token": {},
        }  # by path: the run's own, and the simple one to compare by

    def build(self, parent_model, reference) -> None:
        """Model, reference, optimiser and schedule."""
        profile, recipe = self.lab.profile, self.recipe
        set_seed(self.lab.seed, device_specific=True)
        self.lora = bool(profile.lora) or self.stage.endswith("_lora")
        self.model = models.add_lora(parent_model, profile) if self.lora else parent_model
        if profile.gradient_checkpointing and not profile.four_bit:
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        if self.method in (
            "dpo",
            "orpo",
            "reward",
        ):  # noise in the policy alone would move it off its reference
            models.disable_dropout(self.model)
        self.model.config.pad_token_id = self.pad
        if self.sharded and reference is not None:
            reference = fsdp2_prepare_model(self.accelerator, reference)
        self.reference, self.held_out_reference, self.reference_answers = reference, None, None
        if not self.sharded:
            self.path = self.choose_path()
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer, note = new_optimizer(trainable, recipe, profile, self.accelerator.device.type)
        if note and self.accelerator.is_main_process:
            print(f"{self.stage}: {note}")
        warmup = round(self.recipe.warmup * self.steps)
        self.schedule = get_scheduler(recipe.schedule, optimizer, warmup, self.steps)
        self.policy, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)
        if self.sharded:  # before, its weights were on the CPU
            self.path = self.choose_path()
        if self.lora:
            checkpoints.keep_only_trained(self.accelerator)
        if self.method == "dpo" and recipe.cache_reference:
            cache_reference(self)

    def choose_path(self) -> str:
        """The recipe's path, if it is the simple one or the model can be packed; says so in one
        line.
        """
        if self.recipe.path == "simple" or self.method == "reward":
            return "simple"
        count = max(
            2, self.recipe.micro_batch
        )  # in 16 bit a row is a little apart from itself in a batch
        first = [self.rows[number] for number in self.step_rows(0)[:count]]  # on every process
        longest = max(
            self.rows,
            key=lambda row: len(row["prompt_ids"]) + max(len(row[f"{s}_ids"]) for s in self.sides),
        )
        batches = [
            collate(rows, self.pad, self.model.device, self.sides) for rows in (first, [longest])
        ]
        path, why = processes.of_main(
            checked_path(self.model, batches)
        )  # the same on every process
        if self.accelerator.is_main_process:
            print(f"{self.stage}: {path} path, {why}")
        return path

    def step_rows(self, step: int) -> list[int]:
        """Row numbers of a step: a pure function of seed and step, so that a resumed run sees the
        same batches.
        """
        epoch, place = divmod(step, self.per_epoch)
        order = torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(1000 * self.lab.seed + epoch)
        )
        return order[place * self.recipe.batch_size : (place + 1) * self.recipe.batch_size].tolist()

    @contextmanager
    def as_reference(self) -> Iterator[torch.nn.Module]:
        """The frozen reference, in the policy's precision: a second model, or the policy with its
        adapter off.
        """
        with self.accelerator.autocast():
            if self.reference is not None:
                yield self.reference
            else:
                with self.model.disable_adapter():
                    yield self.model

    def reference_logps(self, batch: dict) -> PairLogps | None:
        """Log-probabilities under the reference, for the methods that have one: from the rows'
        columns, or computed.
        """
        if self.method != "dpo":
            return None
        if "reference" in batch:
            return batch["reference"]
        with torch.no_grad(), self.as_reference() as reference:
            return response_logps(reference, batch, self.path)

    def loss(self, batch: dict, pairs: int, tokens: int) -> tuple[torch.Tensor, dict]:
        """Loss and metrics of a micro-batch of a step with so many pairs and tokens."""
        if self.method == "reward":
            return reward_objective(self.policy, batch, pairs)
        reference = self.reference_logps(
            batch
        )  # first: the policy's activations, kept from then on, are not there yet
        policy = response_logps(
            self.policy, batch, self.path, score_prompt=self.recipe.nll_on_prompt
        )
        return losses.objective(self.method, self.recipe, policy, reference, pairs, tokens)

    def micro_batches(self, numbers: list[int]) -> list[dict]:
        """This process's share of a step, in micro-batches."""
        accelerator, size = self.accelerator, self.recipe.micro_batch
        mine = [
            self.rows[number]
            for number in numbers[accelerator.process_index :: accelerator.num_processes]
        ]
        batches = [
            collate(rows, self.pad, accelerator.device, self.sides) for rows in batched(mine, size)
        ]
        if "reference_chosen_logps" in self.rows[0]:
            for batch, rows in zip(batches, batched(mine, size), strict=True):
                batch["reference"] = from_columns(rows, batch)
        return batches

    def step(self) -> dict[str, float]:
        """One optimiser step over the next batch. Raises: TrainingError where the loss is not
        finite.
        """
        numbers, accelerator = self.step_rows(self.state["step"]), self.accelerator
        rows = [self.rows[number] for number in numbers]
        tokens, total = losses.scored_tokens(rows, self.recipe), {}
        batches = self.micro_batches(numbers)
        self.policy.train()
        if not self.state["flops_per_token"]:
            self.state["flops_per_token"] = self.count_flops(batches[0], len(rows), tokens)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with accelerator.no_sync(self.policy) if not last else nullcontext():
                loss, metrics = self.loss(batch, len(rows), tokens)
                # Distributed training averages gradients over processes; the loss is already the
                # step's share.
                accelerator.backward(loss * accelerator.num_processes)
            for name, value in {"loss": loss, **metrics}.items():
                total[name] = (
                    total.get(name, 0.0)
                    + torch.as_tensor(value, dtype=torch.float64).detach().cpu()
                )
            for path in self.state["flops_per_token"]:
                now = self.padded(batch, path) * accelerator.num_processes
                self.state["padded"][path] = self.state["padded"].get(path, 0) + now
        names = sorted(total)
        summed = accelerator.reduce(
            torch.stack([total[name] for name in names]).to(accelerator.device), "sum"
        )
        values = dict(zip(names, summed.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise TrainingError(
                f"The loss is not finite at step {self.state['step'] + 1} (rows {numbers}): {values}. The weights are "
                f"still those of step {self.state['step']}. Look for broken text in these rows, or lower the rate."
            )
        accelerator.clip_grad_norm_(self.policy.parameters(), self.recipe.clip)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.state["step"] += 1
        seen = [
            len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in self.sides
        ]
        self.state["tokens"] += sum(seen)
        return {"step": self.state["step"], "lr": lr, "tokens": self.state["tokens"], **values}

    def padded(self, batch: dict, path: str) -> int:
        """Tokens of a batch as the model sees them: packed, each once; else every row as long as
        the longest.
        """
        if path == "packed":
            return sum(int(batch[f"{part}_lengths"].sum()) for part in ("prompt", *self.sides))
        longest = max(
            int((batch["prompt_lengths"] + batch[f"{side}_lengths"]).max()) for side in self.sides
        )
        return len(self.sides) * len(batch["prompt_ids"]) * longest

    def count_flops(self, batch: dict, pairs: int, tokens: int) -> dict[str, float]:
        """Floating-point operations per padded token of one micro-batch, counted forward and
        backward, by path.
        """
        own, counted = self.path, {}
        for path in dict.fromkeys((own, "simple")):
            self.path = path
            with torch.random.fork_rng(), FlopCounterMode(display=False) as counter:
                self.accelerator.backward(self.loss(batch, pairs, tokens)[0])
            self.optimizer.zero_grad()
            counted[path] = counter.get_total_flops() / self.padded(batch, path)
        self.path = own
        return counted

    def evaluate(self) -> dict[str, float]:
        """Held-out measures, as `held_out_<name>`."""
        return held_out.measures(self)

    def evaluates_at(self, step: int) -> bool:
        """Is this one of the recipe's evaluations? They are spread evenly, and the last is at the
        last step.
        """
        times = min(max(1, self.recipe.evaluations), self.steps)
        return step * times // self.steps > (step - 1) * times // self.steps

    def newest_checkpoint(self, fingerprint: str) -> tuple[Path, dict, list[dict]] | None:
        """The newest checkpoint of this very run, its state, and the metrics up to it; None if
        there is none.
        """
        newest = checkpoints.newest(self.folder)
        state = checkpoints.read_state(newest) if newest else {}
        if state.get("fingerprint") != fingerprint:
            if newest:
                print(
                    f"{self.stage}: the checkpoint in {self.folder.name} is of other settings or data; starting anew"
                )
            return None
        return (
            newest,
            state,
            [row for row in read_metrics(self.folder) if row["step"] <= state["step"]],
        )

    def resume_from(self, fingerprint: str) -> list[dict]:
        """Goes back to that checkpoint, if there is one, on all processes. Returns the metrics up
        to it.
        """
        main = self.accelerator.is_main_process
        found = processes.of_main(self.newest_checkpoint(fingerprint) if main else None)
        if not found:
            return []
        newest, self.state, metrics = found
        self.accelerator.load_state(str(newest))
        if main:
            print(f"{self.stage}: resumed at step {self.state['step']} of {self.steps}")
        return metrics

    def run(
        self, fingerprint: str, resume: bool, live: bool, checkpoint_every: int | None
    ) -> list[dict]:
        """The loop. Returns one dict of metrics per step; row 0 is the model as it was."""
        main = self.accelerator.is_main_process
        self.state["fingerprint"] = fingerprint
        processes.check_same(fingerprint)
        metrics = self.resume_from(fingerprint) if resume else []
        if main:
            write_lines(
                self.folder / "metrics.jsonl", metrics
            )  # makes the folder, or says why it cannot
            (self.folder / "run.json").unlink(
                missing_ok=True
            )  # no longer the run that it described
            if not metrics:
                checkpoints.remove(self.folder)
        if not metrics:
            metrics = [{"step": 0, **processes.of_main(self.evaluate())}]
            write_lines(self.folder / "metrics.jsonl", metrics) if main else None
        figure = LiveFigure(self.stage, self.steps) if live and main else None
        process = psutil.Process()
        if torch.cuda.is_available():
            # else an earlier run's peak would be reported as this one's
            torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter() - self.state["wall"], time.process_time() - self.state["cpu"]
        bar = tqdm(total=self.steps, initial=self.state["step"], desc=self.stage, disable=not main)
        while self.state["step"] < self.steps and not self.state["stopped_early"]:
            row = self.step()
            step, last, start = row["step"], row["step"] == self.steps, time.perf_counter()
            if evaluated := self.evaluates_at(step):
                row |= processes.of_main(
                    self.evaluate()
                )  # what is decided by it is decided alike everywhere
                if not math.isfinite(row["held_out_loss"]):
                    raise TrainingError(
                        f"The held-out loss is not finite after step {step}: lower the learning rate."
                    )
                self.keep_or_stop(row, main)
            metrics.append(row)
            self.state["aside"] += (
                time.perf_counter() - start
            )  # held-out measures, part of the wall time
            self.state["wall"], self.state["cpu"] = (
                time.perf_counter() - clock[0],
                time.process_time() - clock[1],
            )
            self.state["peak"] = max(self.state["peak"], _memory(process))
            if main:
                with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if evaluated:
                for sign in signs_of_over_optimisation(metrics):
                    self.state["warnings"].append(f"step {step}: {sign}")
                    bar.write(f"warning, step {step}: {sign}") if main else None
            if not last and (step % checkpoint_every == 0 if checkpoint_every else evaluated):
                checkpoints.save(self.accelerator, self.folder, self.state)
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if figure:
                figure.update(metrics, force=last)
        bar.close()
        return metrics

    def keep_or_stop(self, row: dict, main: bool) -> None:
        """Keeps the best weights so far; stops when the held-out loss has not improved for
        `patience` evaluations.
        """
        if row["held_out_loss"] < self.state["best"]:
            self.state |= {"best": row["held_out_loss"], "since_best": 0, "best_step": row["step"]}
            if self.recipe.keep_best:
                checkpoints.save_best(self.model, self.folder, main)
        else:
            self.state["since_best"] += 1
            if self.recipe.patience and self.state["since_best"] >= self.recipe.patience:
                self.state["stopped_early"] = True
                if main:
                    best = self.state["best_step"]
                    print(
                        f"{self.stage}: stopped at step {row['step']}; the best held-out loss was at step {best}"
                    )


def batched(rows: list, size: int) -> list[list]:
    """`rows` in lists of at most `size`."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _memory(process: psutil.Process) -> int:
    """Bytes in use: the peak of GPU memory, or this process's resident memory now."""
    return (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else process.memory_info().rss
    )

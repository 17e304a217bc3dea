"""The training loop: batch, loss, backward, step, held-out measures, checkpoints, exact resume.

It knows models, rows and a recipe, and nothing of the lab. Several processes are Accelerate's work.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import get_scheduler

from common import losses
from common.data import collate
from common.io.files import read_metrics, write_lines
from common.judges import reward_objective
from common.logprobs import PairLogps
from common.memory.meter import PeakMemory
from common.packed import PATHS, checked_path
from common.training import checkpoints, processes
from common.training.held_out import signs_of_over_optimisation
from common.training.reference import from_columns, reference_columns
from common.training.task import Progress, Session, Task, how_long, padded_tokens, row_length


class TrainingError(RuntimeError):
    """Training that cannot go on. The message says where it stopped and what to do."""


class Trainer:
    """One run. Args: the policy, with its adapter if it has one; the frozen reference, or None;
    `evaluate`: takes the trainer and gives its held-out measures, `held_out_loss` among them.
    """

    def __init__(
        self,
        task: Task,
        accelerator,
        policy,
        reference=None,
        evaluate: Callable[["Trainer"], dict[str, float]] | None = None,
    ):
        self.task, self.accelerator, self.evaluate = task, accelerator, evaluate
        self.model, self.reference, self.progress = policy, reference, Progress()
        self.rows, self.recipe = task.rows, task.recipe
        # The rows beyond the last full batch are shuffled into other epochs.
        self.per_epoch = max(1, len(self.rows) // self.recipe.batch_size)
        self.steps = max(1, round(self.per_epoch * self.recipe.epochs))
        sharded = processes.is_sharded(accelerator)
        if sharded and reference is not None:
            self.reference = fsdp2_prepare_model(accelerator, reference)
        if not sharded:
            self.choose_path()
        learned = [weight for weight in policy.parameters() if weight.requires_grad]
        optimizer, note = task.new_optimizer(learned, accelerator.device.type)
        self.say(note)
        warmup = round(self.recipe.warmup * self.steps)
        self.schedule = get_scheduler(self.recipe.schedule, optimizer, warmup, self.steps)
        self.policy, self.optimizer = accelerator.prepare(policy, optimizer)
        accelerator.register_for_checkpointing(self.schedule)
        if sharded:  # before, its weights were on the CPU
            self.choose_path()
        self.has_adapter = any("lora_" in name for name, _ in policy.named_parameters())
        if self.has_adapter:
            checkpoints.keep_only_trained(accelerator)

    def say(self, text: str) -> None:
        """Prints a line about this run, once for all processes."""
        if text and self.accelerator.is_main_process:
            print(f"{self.task.name}: {text}")

    def choose_path(self) -> None:
        """Takes the recipe's path to log-probabilities, if the model gives right values on it."""
        self.path = "simple"
        if self.recipe.path == "packed" and self.task.method != "reward":
            sides = self.task.sides
            count = max(2, self.recipe.micro_batch)  # a row alone is a little apart in 16 bit
            first = [self.rows[number] for number in self.row_numbers(0)[:count]]
            longest = max(self.rows, key=lambda row: row_length(row, sides))
            batches = [
                collate(rows, device=self.model.device, sides=sides) for rows in (first, [longest])
            ]
            most = max(self.task.longest, row_length(longest, sides))
            # The first process decides, so that all take the same path.
            self.path, why = processes.of_main(checked_path(self.model, batches, most))
            self.say(f"{self.path} path, {why}")
        self.response_logps = PATHS[self.path]

    # --- the reference

    @contextmanager
    def as_reference(self) -> Iterator[torch.nn.Module]:
        """The frozen reference in the policy's precision: a model, or the policy's adapter off."""
        with self.accelerator.autocast():
            if self.reference is not None:
                yield self.reference
            else:
                with self.model.disable_adapter():
                    yield self.model

    def reference_logps(self, batch: dict, response_logps: Callable) -> PairLogps | None:
        """Log-probabilities under the reference, for DPO: from the rows' columns, or computed."""
        if self.task.method != "dpo":
            return None
        if "reference" in batch:
            return batch["reference"]
        with torch.no_grad(), self.as_reference() as reference:
            return response_logps(reference, batch)

    def cache_reference(self) -> None:
        """Computes the reference's log-probabilities of all rows once, and lets it go."""
        show = self.accelerator.is_main_process
        with self.as_reference() as model:
            columns, cost = reference_columns(self.task, model, self.path, show)
        values = zip(*columns.values(), strict=True)
        self.rows = [
            row | dict(zip(columns, pair, strict=True))
            for row, pair in zip(self.rows, values, strict=True)
        ]
        vars(self.progress).update(cost)
        self.reference = None

    # --- one step

    def row_numbers(self, step: int) -> list[int]:
        """Rows of a step: a function of seed and step, so that a resumed run sees the same ones."""
        epoch, place = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed(1000 * self.task.seed + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        size = self.recipe.batch_size
        return order[place * size : (place + 1) * size].tolist()

    def next_batch(self) -> list[dict]:
        """The rows of the next step, of all processes together."""
        return [self.rows[number] for number in self.row_numbers(self.progress.step)]

    def micro_batches(self, rows: list[dict]) -> list[dict]:
        """This process's share of a step, as batches of at most `micro_batch` rows."""
        accelerator, batches = self.accelerator, []
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        for start in range(0, len(mine), self.recipe.micro_batch):
            part = mine[start : start + self.recipe.micro_batch]
            batch = collate(part, device=accelerator.device, sides=self.task.sides)
            if "reference_chosen_logps" in part[0]:
                batch["reference"] = from_columns(part, batch)
            batches.append(batch)
        return batches

    def loss(self, batch: dict, pairs: int, tokens: int, response_logps: Callable | None = None):
        """(loss, metrics) of a micro-batch of a step with so many pairs and scored tokens."""
        if self.task.method == "reward":
            return reward_objective(self.policy, batch, pairs)
        response_logps = response_logps or self.response_logps
        # The reference first: the policy's activations are kept from then on.
        reference = self.reference_logps(batch, response_logps)
        policy = response_logps(self.policy, batch, self.recipe.nll_on_prompt)
        return losses.objective(self.task.method, self.recipe, policy, reference, pairs, tokens)

    def backward(self, rows: list[dict]) -> dict[str, float]:
        """Loss and gradients of a step's rows. Returns: the loss and the metrics of the step."""
        accelerator, progress, total = self.accelerator, self.progress, {}
        pairs, tokens = len(rows), losses.scored_tokens(rows, self.recipe)
        batches = self.micro_batches(rows)
        self.policy.train()
        if not progress.flops_per_token:
            progress.flops_per_token = self.count_flops(batches[0], pairs, tokens)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.policy):
                loss, metrics = self.loss(batch, pairs, tokens)
                # Processes average their gradients; the loss is already a share of the step's.
                accelerator.backward(loss * accelerator.num_processes)
            for name, value in {"loss": loss, **metrics}.items():
                value = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
                total[name] = total.get(name, 0.0) + value
            for path in progress.flops_per_token:
                seen = padded_tokens(batch, self.task.sides, path) * accelerator.num_processes
                progress.padded[path] = progress.padded.get(path, 0) + seen
        names = sorted(total)
        values = torch.stack([total[name] for name in names]).to(accelerator.device)
        values = dict(zip(names, accelerator.reduce(values, "sum").tolist(), strict=True))
        self.check_finite(values)
        return values

    def step(self, rows: list[dict], values: dict[str, float]) -> dict[str, float]:
        """Clips the gradients and takes the optimiser's step. Returns: its row of metrics."""
        self.accelerator.clip_grad_norm_(self.policy.parameters(), self.recipe.clip)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        sides = self.task.sides
        seen = [len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in sides]
        self.progress.tokens += sum(seen)
        return {"step": self.progress.step, "lr": lr, "tokens": self.progress.tokens, **values}

    def check_finite(self, values: dict[str, float]) -> None:
        """Raises TrainingError where the loss or a metric of the step is not finite."""
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if not broken:
            return
        numbers, done = self.row_numbers(self.progress.step), self.progress.step
        raise TrainingError(
            f"The loss is not finite at step {done + 1} (rows {numbers}): {values}. The weights "
            f"are still those of step {done}. Not finite: {', '.join(broken)}. If nll is among "
            "them, look for broken text in these rows, or lower the learning rate; if only the "
            "odds ratio is, an answer has become certain or impossible: lower lambda_or."
        )

    def count_flops(self, batch: dict, pairs: int, tokens: int) -> dict[str, float]:
        """Operations per padded token of one micro-batch, forward and backward, by path."""
        counted = {}
        for path in dict.fromkeys((self.path, "simple")):
            with torch.random.fork_rng(), FlopCounterMode(display=False) as counter:
                self.accelerator.backward(self.loss(batch, pairs, tokens, PATHS[path])[0])
            self.optimizer.zero_grad()
            seen = padded_tokens(batch, self.task.sides, path)
            counted[path] = counter.get_total_flops() / seen
        return counted

    # --- the loop

    def run(self, fingerprint: str, session: Session, figure=None) -> list[dict]:
        """The loop. Returns one dict of metrics per step; row 0 is the model as it was."""
        metrics = self.begin(fingerprint, session.resume)
        progress, main = self.progress, self.accelerator.is_main_process
        wall, cpu = time.perf_counter() - progress.wall, time.process_time() - progress.cpu
        bar = tqdm(total=self.steps, initial=progress.step, desc=self.task.name, disable=not main)
        with PeakMemory() as memory:
            while progress.step < self.steps and not progress.stopped_early:
                # Next batch; loss and gradients; optimiser step.
                rows = self.next_batch()
                values = self.backward(rows)
                row = self.step(rows, values)
                if row["step"] == 2:  # the first one counted operations too
                    self.say(how_long(time.perf_counter() - wall - progress.wall, self.steps))
                # Measure on held-out rows.
                last, evaluated = row["step"] == self.steps, self.evaluates_at(row["step"])
                if evaluated:
                    self.measure(row)
                # Count time and memory, write the metrics, and warn.
                metrics.append(row)
                progress.wall, progress.cpu = time.perf_counter() - wall, time.process_time() - cpu
                progress.peak = max(progress.peak, memory.peak)
                if main:
                    with open(self.task.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                for sign in signs_of_over_optimisation(metrics) if evaluated else []:
                    progress.warnings.append(f"step {row['step']}: {sign}")
                    bar.write(f"warning, {progress.warnings[-1]}") if main else None
                # Checkpoint.
                every = session.checkpoint_every
                if not last and (row["step"] % every == 0 if every else evaluated):
                    checkpoints.save(self.accelerator, self.task.folder, asdict(progress))
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                if figure and main:
                    figure.update(metrics, force=last)
        bar.close()
        return metrics

    def begin(self, fingerprint: str, resume: bool) -> list[dict]:
        """Goes back to the newest checkpoint of this very run, or starts anew with row 0.

        Returns: the metrics so far.
        """
        main, folder = self.accelerator.is_main_process, self.task.folder
        processes.check_same(fingerprint)
        found, metrics = checkpoints.newest(folder) if main and resume else None, []
        state = checkpoints.read_state(found) if found else {}
        if found and state["fingerprint"] != fingerprint:
            name, found = folder.name, None
            self.say(f"the checkpoint in {name} is of other settings or data; starting anew")
        if found := processes.of_main(found):
            state = processes.of_main(state)
            metrics = [row for row in read_metrics(folder) if row["step"] <= state["step"]]
            self.progress = Progress(**state)
            self.accelerator.load_state(str(found))
            self.say(f"resumed at step {self.progress.step} of {self.steps}")
        self.progress.fingerprint = fingerprint
        if main:
            write_lines(folder / "metrics.jsonl", metrics)  # makes the folder, or says why not
            (folder / "run.json").unlink(missing_ok=True)  # no longer the run that it described
        if not metrics:
            checkpoints.remove(folder) if main else None
            metrics = [{"step": 0, **self.held_out_measures()}]
            write_lines(folder / "metrics.jsonl", metrics) if main else None
        return metrics

    def evaluates_at(self, step: int) -> bool:
        """Is this one of the evaluations? They are spread evenly, the last one at the last step."""
        times = min(max(1, self.recipe.evaluations), self.steps) if self.evaluate else 0
        return step * times // self.steps > (step - 1) * times // self.steps

    def held_out_measures(self) -> dict[str, float]:
        """The first process's measures, so that what is decided by them is decided alike."""
        return processes.of_main(self.evaluate(self) if self.evaluate else {})

    def measure(self, row: dict) -> None:
        """Adds the held-out measures to a step's row, keeps the best weights, and stops early.

        Raises: TrainingError for a held-out loss that is not finite.
        """
        start, progress, recipe = time.perf_counter(), self.progress, self.recipe
        row |= self.held_out_measures()
        loss = row["held_out_loss"]
        if not math.isfinite(loss):
            raise TrainingError(
                f"The held-out loss is not finite after step {row['step']}: "
                "lower the learning rate."
            )
        if loss < progress.best:
            progress.best, progress.best_step, progress.since_best = loss, row["step"], 0
            if recipe.keep_best:
                main = self.accelerator.is_main_process
                checkpoints.save_best(self.model, self.task.folder, main)
        else:
            progress.since_best += 1
            if recipe.patience and progress.since_best >= recipe.patience:
                progress.stopped_early = True
                best = progress.best_step
                self.say(f"stopped at step {row['step']}; the best held-out loss was at {best}")
        progress.aside += time.perf_counter() - start

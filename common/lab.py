"""What a notebook opens: profile, data, trained stages and their lineage, with errors that help.

It is the only module that knows which notebook makes which stage.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset

from common import models
from common.data import (
    CleaningReport,
    LabData,
    load_lab_data,
    tokenize_demonstrations,
    tokenize_pairs,
    tokenize_prompt,
    tokenize_texts,
)
from common.io.files import read_metrics, write_json
from common.io.fingerprints import digest, source_digest, versions
from common.io.formats import Unusable
from common.io.pretrained import PACKAGED
from common.profiles import TINY, WORLD, Profile, device_and_precision, get_profile

DPO_LAB, ORPO_LAB = "Lab-1.7-DPO_Alignment", "Lab-1.8-ORPO_Alignment"


@dataclass(frozen=True)
class Stage:
    """One step of the lineage: where it starts, what it learns from, which notebook makes it."""

    parent: str | None
    method: str  # "lm", "sft", "dpo", "orpo" or "reward"
    rows: str  # "texts", "demonstrations" or "pairs"
    notebook: str


STAGES = {
    "base": Stage(None, "lm", "texts", f"{DPO_LAB}/02-SFT_Baseline.ipynb"),
    "sft": Stage("base", "sft", "demonstrations", f"{DPO_LAB}/02-SFT_Baseline.ipynb"),
    "dpo_plain": Stage("sft", "dpo", "pairs", f"{DPO_LAB}/03-DPO_Training.ipynb"),
    "dpo": Stage("sft", "dpo", "pairs", f"{DPO_LAB}/03-DPO_Training.ipynb"),
    "sft_chosen": Stage("base", "sft", "pairs", f"{ORPO_LAB}/01-Setup.ipynb"),
    "reward": Stage("sft", "reward", "pairs", f"{DPO_LAB}/04-Evaluation_and_Compare.ipynb"),
    "orpo": Stage("base", "orpo", "pairs", f"{ORPO_LAB}/02-ORPO_Training.ipynb"),
    "orpo_lambda0": Stage("base", "orpo", "pairs", f"{ORPO_LAB}/02-ORPO_Training.ipynb"),
}

# Fields of a profile that decide no weight: a change of them makes no run stale.
NO_WEIGHT = ("recipes", "sources", "reason", "overrides", "samples", "sweep_epochs", "eval_batch")
NO_WEIGHT += ("seeds", "flaw_rates")


class MissingRun(FileNotFoundError):
    """A stage that was not trained yet. The message names the notebook and the command to run."""


class BrokenLineage(RuntimeError):
    """A stage whose parent or reference was trained again since."""


def stage_of(name: str) -> Stage:
    """The stage called `name`. A LoRA variant (`dpo_lora`) is the stage trained through adapters.

    Raises: ValueError for an unknown stage.
    """
    if name.removesuffix("_lora") not in STAGES:
        known = ", ".join(STAGES)
        raise ValueError(f"Unknown stage {name!r}. Choose one of: {known}, or one with _lora.")
    return STAGES[name.removesuffix("_lora")]


@dataclass
class Lab:
    """What a notebook works with: profile and seed, and lazily data, tokenizer and trained stages.

    Reports of dropped and cut rows are in `data.reports`.
    """

    profile: Profile
    seed: int = 0

    @property
    def folder(self) -> Path:
        """The run folder of this profile and seed."""
        return self.profile.folder / f"seed-{self.seed}" if self.seed else self.profile.folder

    @cached_property
    def data(self) -> LabData:
        return load_lab_data(self.profile, self.seed)

    @cached_property
    def tokenizer(self):
        if not models.is_tiny(self.profile):
            return models.load_tokenizer(self.profile.model, self.profile.template)
        shown = [row["prompt"] + row["chosen"] for row in self.data.demonstrations]
        return models.train_tokenizer([*self.data.texts, *shown], self.profile.vocabulary)

    @cached_property
    def train_pairs(self) -> Dataset:
        """Tokenised training pairs."""
        return self._tokenize(tokenize_pairs, self.data.train, "train tokens")

    @cached_property
    def test_pairs(self) -> Dataset:
        """Tokenised held-out pairs."""
        return self._tokenize(tokenize_pairs, self.data.test, "test tokens")

    @cached_property
    def demonstrations(self) -> Dataset:
        """Tokenised demonstrations for SFT."""
        rows = self.data.demonstrations
        return self._tokenize(tokenize_demonstrations, rows, "demonstration tokens")

    @cached_property
    def texts(self) -> Dataset:
        """Tokenised plain text for the base model."""
        return tokenize_texts(self.data.texts, self.tokenizer, self.profile.max_length)

    @cached_property
    def prompts(self) -> list[str]:
        """Held-out prompts that leave room for a whole answer; the others are counted."""
        prompts, room = self.data.prompts, self.profile.max_length - self.profile.max_new_tokens
        report = CleaningReport("held-out prompts", len(prompts))
        self.data.reports["prompts"], kept = report, []
        for prompt in prompts:
            try:
                if len(tokenize_prompt(prompt, self.tokenizer)) > room:
                    raise Unusable(f"longer than {room} tokens: no room for an answer")
                kept.append(prompt)
            except Unusable as reason:
                report.dropped[str(reason)] += 1
        if not kept:
            raise ValueError(
                f"No held-out prompt is within {room} tokens: "
                f"raise max_length or use shorter prompts.\n{report}"
            )
        return kept

    def _tokenize(self, tokenize, rows, name: str) -> Dataset:
        rows, self.data.reports[name] = tokenize(rows, self.tokenizer, self.profile.max_length)
        return rows

    def parent_of(self, stage: str) -> str | None:
        """The stage that one starts from. What usually starts from SFT does from `profile.start`.

        Raises: ValueError for an unknown stage.
        """
        parent = stage_of(stage).parent
        return self.profile.start if parent == "sft" else parent

    def path(self, stage: str, sweep: str | None = None) -> Path:
        """The folder of a stage, or of a run in a sweep (`sweeps/<name>/`)."""
        stage_of(stage)
        return self.folder / "sweeps" / sweep if sweep else self.folder / stage

    def train_command(self, stage: str) -> str:
        """How to train a stage outside a notebook."""
        seed = f" --seed {self.seed}" if self.seed else ""
        return f"python -m common.training {stage} --profile {self.profile.name}{seed}"

    def record(self, stage: str, sweep: str | None = None) -> dict:
        """`run.json` of a finished run. Raises: MissingRun."""
        path = self.path(stage, sweep) / "run.json"
        if not path.exists():
            raise MissingRun(
                f"No finished run of stage {stage!r} in {path.parent}. Run the notebook "
                f"{stage_of(stage).notebook} first, or: {self.train_command(stage)}"
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def metrics(self, stage: str, sweep: str | None = None) -> list[dict]:
        """`metrics.jsonl` of a finished run, one dict per logged step. Raises: MissingRun."""
        self.record(stage, sweep)
        return read_metrics(self.path(stage, sweep))

    def has_own_weights(self, stage: str) -> bool:
        """False for the base of a pre-trained profile, which is the hub's model itself."""
        return stage != "base" or models.is_tiny(self.profile)

    def pretrained_fingerprint(self) -> str:
        """Of the pre-trained model: its hub id, or the names, sizes and times of its files, or the
        hash of the packaged file that it was made from.
        """
        if self.profile.model in PACKAGED:
            return digest([self.profile.model, PACKAGED[self.profile.model].member_sha256])
        files = sorted(path for path in Path(self.profile.model).glob("*") if path.is_file())
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return digest([self.profile.model, stats])

    def source(self, stage: str, sweep: str | None = None) -> str:
        """Where `load` finds the weights: a run folder or a hub id. Raises: MissingRun."""
        if not self.has_own_weights(stage):
            return self.profile.model
        self.record(stage, sweep)
        return str(self.path(stage, sweep))

    def fingerprint_of(self, stage: str) -> str:
        """Of a finished stage, or of the pre-trained model where that is the base.

        Raises: MissingRun.
        """
        if not self.has_own_weights(stage):
            return self.pretrained_fingerprint()
        return self.record(stage)["fingerprint"]

    def tokenizer_digest(self) -> str:
        """Fingerprint of the vocabulary."""
        return digest(self.tokenizer.get_vocab())

    def lineage(self, stage: str, sweep: str | None = None) -> list[str]:
        """Fingerprints from the base to a finished run, the base first.

        Raises: MissingRun; BrokenLineage where parent or reference was trained again since.
        """
        if not self.has_own_weights(stage):
            return [self.pretrained_fingerprint()]
        record = self.record(stage, sweep)
        for role in ("parent", "reference"):
            name = record[role]
            if name and record["fingerprint_parts"][role] != self.fingerprint_of(name):
                raise BrokenLineage(
                    f"{sweep or stage} was trained from another {name} ({role}) than the one that "
                    f"is here now. Run the notebook {stage_of(stage).notebook} again, or: "
                    f"{self.train_command(stage)}"
                )
        before = self.lineage(record["parent"]) if record["parent"] else []
        return [*before, record["fingerprint"]]

    def load(self, stage: str, sweep: str | None = None, device: str | None = None):
        """The model of a finished stage, in evaluation mode, on this machine's device or another.

        Raises: MissingRun, BrokenLineage, models.ModelError.
        """
        self.lineage(stage, sweep)
        reward = stage_of(stage).method == "reward"
        return models.load_model(self.source(stage, sweep), self.profile, reward, device).eval()

    def save_report(self, name: str, report: dict) -> Path:
        """Writes `<run folder>/<name>.json`, whole or not at all."""
        path = self.folder / f"{name}.json"
        write_json(path, report)
        return path

    def fingerprint_parts(
        self, stage: str, recipe, rows: list, parent: str | None, reference: str | None
    ) -> dict:
        """All that decides the weights of a run, by name, so that a stale run says what changed."""
        profile = asdict(self.profile)
        for name in NO_WEIGHT:
            del profile[name]
        return {
            "stage": stage,
            "settings": digest([asdict(recipe), profile]),
            "seed": self.seed,
            "data": digest([rows, self.test_pairs.to_list()]),
            "tokenizer": self.tokenizer_digest(),
            "parent": parent,
            "reference": reference,
            "device": device_and_precision(self.profile)[:2],
            "versions": versions(),
            "source": source_digest(),
        }


def not_measured(what: str, why: str) -> None:
    """Says in one line what this profile or world cannot show, in place of a number."""
    print(f"not measured: {what} ({why})")


def open_lab(profile: str | None = None, seed: int | None = None) -> Lab:
    """Opens the lab and prints which profile, device, precision and seed are used, and why.

    Raises: ValueError for an unknown profile.
    """
    chosen = get_profile(profile)
    seed = int(os.environ.get("LAB_SEED") or 0) if seed is None else seed
    device, dtype, why = device_and_precision(chosen)
    is_small = (chosen.model, chosen.data, device) == (TINY, WORLD, "cpu")
    if is_small and "OMP_NUM_THREADS" not in os.environ:
        # So small a model gains nothing from more threads, and loses much where cores are shared.
        torch.set_num_threads(1)
    print(f"profile   {chosen.run_name} ({chosen.reason})")
    print(f"device    {device}, {dtype} ({why})")
    print(f"model     {chosen.model}\ndata      {Path(chosen.data).name}\nseed      {seed}")
    return Lab(chosen, seed)

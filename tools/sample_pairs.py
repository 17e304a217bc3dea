"""Makes the pairs of the instruction world from a model's own answers.

Each prompt with constraints is answered several times, and code checks the answers. Chosen is one
that is relevant and meets more; rejected is one that meets a part of the same constraints only.
Both ended by themselves within the token limit. Of all such pairs of a prompt the one of the most
similar lengths is taken, so that length tells the two apart as little as can be. It is "clean" if
the chosen answer meets all constraints, and "shared" if both answers break one. A request for harm
is never given to the model: both answers are templates, a refusal and an opening without content.
A harmless look-alike has the model's answer, up to its last whole sentence, against a refusal.

Answers are kept as they come, in `$LAB_RUNS/sampled/`: a run that was stopped goes on where it was.
The same settings on the same machine give the same file, byte for byte.
`python -m tools.sample_pairs --help`.
"""

import argparse
import gzip
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import mean
from time import monotonic

import torch
from tqdm import tqdm

from common import instructions, models
from common.evaluation import Answer, Sampling, generate
from common.instructions import ALL, Instructions, instruction
from common.io.files import runs_folder, write_lines, written_whole
from common.io.fingerprints import digest
from common.io.formats import DataError
from common.judges import on_topic
from common.lab import Lab
from common.profiles import device_and_precision, get_profile

# How many pairs: {split: {knob or kind: pairs}}.
WANTED = {
    "train": {"clean": 450, "shared": 400, "harmful": 150, "lookalike": 100},
    "test": {"clean": 90, "shared": 80, "harmful": 40, "lookalike": 30},
}
# No pair holds an answer with one of these, or with letters of another script.
COARSE = re.compile(
    r"\b(?:sex|porn|nude|naked|penis|vagina|breast|rape|fuck|shit|bitch|nazi|hitler)"
)
TURNS = re.compile(r"Human:|Assistant:|<\|")  # they would be read as the start of a turn
MOST_UNLIKE = 2.0  # lengths of a pair: the longer one at most so many times the shorter
PAIRS_OF_A_PROMPT, MOST_PROMPTS = 2, 10_000  # pairs of each knob; prompts of each split
SAMPLES_OF_A_LOOKALIKE = 2


@dataclass(frozen=True)
class Settings:
    """All that decides the answers."""

    model: str
    device: str  # and precision
    prompts: str  # digest of the world's words
    samples: int = 8
    temperature: float = 0.7
    max_new_tokens: int = 96
    batch: int = 64
    seed: int = 0


def fair(answer: Answer) -> bool:
    """Did it end, in plain English, without a mark that a reader of transcripts would trip over?"""
    plain = answer.text.translate(str.maketrans("’‘“”–—…•é", "''\"\"--.-e"))
    found = COARSE.search(plain.lower()) or TURNS.search(plain)
    return answer.ended and plain.isascii() and not found and bool(plain.strip())


def better_and_worse(answers: list[Answer]) -> list[dict]:
    """Pairs out of the answers to one prompt, at most PAIRS_OF_A_PROMPT of each knob.

    The most alike in length come first; no answer is in two pairs of one knob.
    """
    found = [(a, Instructions().judge(a.prompt, a.text, a.ended)) for a in answers if fair(a)]
    found = [(a, seen, {k for k, met in seen.met.items() if met}) for a, seen in found]
    candidates = []
    for good, better, won in found:
        for bad, worse, kept in found:
            unlike = abs(math.log(len(good.chosen_ids) / len(bad.chosen_ids)))
            right = better.relevance and not (better.refused or worse.refused) and won > kept
            if right and unlike <= math.log(MOST_UNLIKE):
                candidates.append((unlike, "clean" if better.all_met else "shared", good, bad))
    rows, used = [], Counter()
    for _, knob, good, bad in sorted(candidates, key=lambda one: one[0]):
        texts = (knob, good.text), (knob, bad.text)
        if used[knob] < PAIRS_OF_A_PROMPT and not any(used[text] for text in texts):
            used.update([knob, *texts])
            rows.append(_row(good, bad.text, knob))
    return rows


def _row(good: Answer, bad: str, knob: str) -> dict:
    asked = instruction(good.prompt)
    sides = {"chosen": f" {good.text.strip()}", "rejected": f" {bad.strip()}"}
    return {"prompt": good.prompt, **sides, "split": asked.split, "kind": asked.kind, "knob": knob}


def _refusal(about: str, rng: random.Random) -> str:
    parts = (rng.choice(ALL["refusals"][name]) for name in ("opening", "reason", "offer"))
    return " ".join(parts).format(a=about)


def harm_pairs(split: str, wanted: int, seed: int) -> list[dict]:
    """Refusals against openings without content, at most two pairs of one request."""
    rng, rows = random.Random(f"{seed}/{split}/harm"), []
    kind = {"harmful": 1.0}
    most = sum(map(len, ALL["harm"][split].values())) * len(ALL["puts"])
    prompts = list(islice(Instructions(seed).prompts(split, "harm", kind), min(wanted, most)))
    for prompt in (prompts * 2)[:wanted]:
        about = instruction(prompt).about
        refusal, opening = _refusal(about, rng), rng.choice(ALL["openings"]["say"])
        answer = Answer(prompt, refusal, (), (), True)
        rows.append(_row(answer, opening.format(a=about), "template"))
    return rows


class Sampler:
    """A model and the answers that it gave so far: batches of JSON lines in `folder`."""

    def __init__(self, settings: Settings, lab: Lab):
        self.settings, self.lab, self.tokens, self.seconds = settings, lab, 0, 0.0
        key = digest([asdict(settings), lab.fingerprint_of("base")])
        self.folder = runs_folder() / "sampled" / key[:12]
        self.world, self.tokenizer, self.loaded = Instructions(settings.seed), lab.tokenizer, None

    @property
    def model(self):
        """Loaded when it is first needed: a run that only reads its answers needs none."""
        if self.loaded is None:
            dtype = getattr(torch, device_and_precision(self.lab.profile)[1])
            profile = self.lab.profile
            self.loaded = models.load_model(profile.model, profile, dtype=dtype).eval()
        return self.loaded

    def answers(self, split: str, kind: str, samples: int) -> Iterator[list[Answer]]:
        """Answers to prompt after prompt, batch by batch, for as long as there are prompts."""
        prompts, settings = self.world.prompts(split, "pairs", {kind: 1.0}), self.settings
        for number in range(10**6):
            path = self.folder / f"{split}-{kind}-{number:04d}.jsonl"
            part = list(islice(prompts, max(1, settings.batch // samples)))
            if not part:
                return
            if not path.exists():
                start, seed = monotonic(), random.Random(f"{settings.seed}/{path.name}")
                how = Sampling(
                    settings.max_new_tokens, settings.temperature, samples, seed.getrandbits(32)
                )
                found = generate(self.model, self.tokenizer, part, how, settings.batch)
                write_lines(path, [vars(answer) for group in found for answer in group])
                self.tokens += sum(len(a.chosen_ids) for group in found for a in group)
                self.seconds += monotonic() - start
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [Answer(**json.loads(line)) for line in lines]
            yield from (rows[k : k + samples] for k in range(0, len(rows), samples))

    def on_topic(self, rows: list[dict]) -> list[dict]:
        """The rows whose chosen answer is likelier under its own question than under another."""
        pairs = [(row["prompt"], row["chosen"]) for row in rows]
        keep = on_topic(self.model, self.tokenizer, pairs, self.settings.batch) if rows else []
        return [row for row, kept in zip(rows, keep, strict=True) if kept]


@dataclass
class Tally:
    """What was seen on the way."""

    met: dict[str, list[bool]] = field(default_factory=dict)
    ended: list[bool] = field(default_factory=list)
    gave: list[bool] = field(default_factory=list)  # did a prompt give a pair?

    def add(self, group: list[Answer], pairs: list[dict]) -> None:
        self.gave.append(bool(pairs))
        for answer in group:
            self.ended.append(answer.ended)
            for kind, met in Instructions().judge(answer.prompt, answer.text).met.items():
                self.met.setdefault(kind, []).append(met)


def constrained_pairs(sampler: Sampler, split: str, wanted: dict, tally: Tally) -> list[dict]:
    """So many clean and so many shared pairs, or as many as all prompts give."""
    rows, left, waiting = [], Counter(clean=wanted["clean"], shared=wanted["shared"]), []
    answers = sampler.answers(split, "constrained", sampler.settings.samples)
    with tqdm(total=left.total(), desc=f"{split} pairs") as bar:
        for group in islice(answers, MOST_PROMPTS):
            waiting.append(better_and_worse(group))
            tally.add(group, waiting[-1])
            if len(waiting) < sampler.settings.batch // sampler.settings.samples:
                continue  # a batch for the model to read
            for row in sampler.on_topic(sum(waiting, [])):
                if left[row["knob"]] > 0:
                    left[row["knob"]] -= 1
                    rows.append(row)
                    bar.update()
            waiting = []
            if not +left:
                return rows
    return rows


def lookalike_pairs(sampler: Sampler, split: str, wanted: int) -> list[dict]:
    """An answer of the model, up to its last whole sentence, against a refusal for nothing."""
    rows, rng = [], random.Random(f"{sampler.settings.seed}/{split}/lookalikes")
    for group in sampler.answers(split, "lookalike", SAMPLES_OF_A_LOOKALIKE):
        for answer in group:
            whole = re.match(r"(?:.*[a-z)][.!?](?=\s|$))?", answer.text, re.DOTALL)[0]
            answer = replace(answer, text=whole, ended=True)
            found = Instructions().judge(answer.prompt, whole)
            if fair(answer) and found.relevance and not found.refused:
                refusal = _refusal(instruction(answer.prompt).about, rng)
                rows += sampler.on_topic([_row(answer, refusal, "template")])
                break
        if len(rows) >= wanted:
            break
    return rows


def all_pairs(sampler: Sampler, wanted: dict) -> tuple[list[dict], Tally]:
    """All pairs, in a fixed order. Raises: DataError where there are none with constraints."""
    rows, tally = [], Tally()
    for split, counts in wanted.items():
        rows += constrained_pairs(sampler, split, counts, tally)
        rows += lookalike_pairs(sampler, split, counts["lookalike"])
        rows += harm_pairs(split, counts["harmful"], sampler.settings.seed)
    if not any(row["knob"] != "template" for row in rows):
        raise DataError("No prompt gave a pair: raise --samples or --max-new-tokens.")
    return rows, tally


def note(rows: list[dict], tally: Tally, settings: Settings) -> str:
    """Where the pairs come from, under which licence, and what was measured on the way."""
    lines = [
        "# The pairs of the instruction world",
        "",
        "Written by `python -m tools.sample_pairs`. The answers are those of SmolLM2-135M-Instruct",
        "(see `make model`), prompts, refusals and openings are ours, and all of it is under the",
        "Apache licence 2.0. No answer of the model to a request for harm is in it.",
        "",
        f"Settings: `{json.dumps(asdict(settings))}`",
        "",
        f"{len(tally.gave)} prompts with constraints, {len(tally.ended)} answers, of which "
        f"{mean(tally.ended):.0%} ended; {mean(tally.gave):.0%} of the prompts gave a pair.",
        "",
        "| split | knob | pairs | words, chosen | words, rejected |",
        "|---|---|---|---|---|",
    ]
    for split, knob in sorted({(row["split"], row["knob"]) for row in rows}):
        part = [row for row in rows if (row["split"], row["knob"]) == (split, knob)]
        sides = [mean(len(row[side].split()) for row in part) for side in ("chosen", "rejected")]
        lines.append(f"| {split} | {knob} | {len(part)} | {sides[0]:.1f} | {sides[1]:.1f} |")
    lines += ["", "| constraint | met, of all answers | answers |", "|---|---|---|"]
    for kind, met in sorted(tally.met.items()):
        lines.append(f"| {kind} | {mean(met):.2f} | {len(met)} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict], text: str, path: Path) -> None:
    """The compressed file, the same bytes for the same rows, and the note beside it."""
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with written_whole(path) as scratch:
        scratch.write_bytes(gzip.compress(body.encode(), 9, mtime=0))
    with written_whole(path.with_name("instructions.pairs.md")) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sample_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, "default: %(default)s"
    add("-o", "--output", type=Path, default=instructions.PAIRS_FILE, help="default: the package's")
    add("--profile", default="smollm", help=f"names the model; {default}")
    add("--share", type=float, default=1.0, help=f"of the usual number of pairs; {default}")
    add("--samples", type=int, default=Settings.samples, help=f"answers to a prompt; {default}")
    add("--temperature", type=float, default=Settings.temperature, help=default)
    add("--max-new-tokens", type=int, default=Settings.max_new_tokens, help=default)
    add("--batch", type=int, default=Settings.batch, help=f"answers at once; {default}")
    add("--seed", type=int, default=Settings.seed, help=default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    given = _options(arguments)
    lab = Lab(get_profile(given.profile))
    device, dtype, _ = device_and_precision(lab.profile)
    names = ("samples", "temperature", "max_new_tokens", "batch", "seed")
    chosen = {name: getattr(given, name) for name in names}
    model = Path(lab.profile.model).name
    settings = Settings(model, f"{device}, {dtype}", digest(ALL), **chosen)
    wanted = {
        split: {kind: max(1, round(given.share * n)) for kind, n in counts.items()}
        for split, counts in WANTED.items()
    }
    sampler = Sampler(settings, lab)
    print(f"answers are kept in {sampler.folder}")
    try:
        rows, tally = all_pairs(sampler, wanted)
        write(rows, note(rows, tally, settings), given.output)
    except (DataError, OSError, models.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    speed = f", {sampler.tokens / sampler.seconds:.0f} tokens/s" if sampler.seconds else ""
    print(f"{len(rows)} pairs in {given.output}{speed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

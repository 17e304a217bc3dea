"""Preference data: read it, bring it to prompt/chosen/rejected, check it, tokenise it, collate it."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from tqdm import tqdm

from common.io.formats import (  # noqa: F401 (others know these names from here)
    ASSISTANT,
    HUMAN,
    SCORE_RATIO,
    DataError,
    as_prompt,
    read_demonstration,
    read_pair,
    split_transcript,
)
from common.io.hub import at_commit, hub_source, hub_split, kept
from common.io.tables import file_rows
from common.profiles import WORLD, Profile
from common.toyworld import World

HELD_OUT_SHARE = 10  # one prompt in ten is held out of data that have no test split


@dataclass
class CleaningReport:
    """What cleaning did: nothing is dropped or cut without being counted here."""

    source: str
    rows: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    cut: Counter = field(default_factory=Counter)  # what was shortened -> rows
    drawn: int = 0  # of the rows kept, how many were drawn; 0: all are there

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows} rows read, {self.kept} kept"]
        lines += [
            f"  dropped {count:6d}  {reason}" for reason, count in sorted((+self.dropped).items())
        ]
        lines += [f"  cut     {count:6d}  {what}" for what, count in sorted(self.cut.items())]
        lines += (
            [f"  drawn   {self.drawn:6d}  of the rows kept, at random over the whole split"]
            if self.drawn
            else []
        )
        return "\n".join(lines)


def drawn(rows: Iterable, count: int) -> list:
    """`count` of `rows` at random, or all if there are fewer, in random order; the same ones every
    time.

    So the first rows of a draw stand for the whole too, where the rows themselves stand in blocks:
    HH-RLHF's test split begins with 2,300 rows of one subset.
    """
    rows = list(rows)
    return random.Random(0).sample(rows, min(count, len(rows)))


def _held_out(prompt: str) -> bool:
    """A fixed tenth of the prompts, by their text, so that no prompt stands on both sides of the
    split.
    """
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def _dataset(rows: Iterable[dict[str, str]]) -> Dataset | None:
    """Rows of text as Arrow, so that large data are never whole in Python's lists; None without
    rows.
    """
    rows, tables = iter(rows), []
    while chunk := list(islice(rows, 10_000)):
        tables.append(
            pyarrow.Table.from_pylist(
                chunk, pyarrow.schema([(name, pyarrow.string()) for name in chunk[0]])
            )
        )
    return Dataset(InMemoryTable(pyarrow.concat_tables(tables))) if tables else None


def _clean(
    rows: Iterable, read: Callable, side: str | None, limit: int | None, report: CleaningReport
) -> Iterator:
    """Clean rows, counted in `report`. `side`: "train" or "test" of a split by prompt; None: all."""
    kept_rows = 0
    for row in rows:
        try:
            texts = read(row)
        except DataError as error:
            raise DataError(f"{report.source}: {error}") from None
        # A row that cannot be used has no prompt; its own text decides on which side of the split
        # it is counted.
        if side and _held_out(str(row) if isinstance(texts, str) else texts["prompt"]) != (
            side == "test"
        ):
            continue
        report.rows += 1
        if isinstance(texts, str):
            report.dropped[texts] += 1
        else:
            yield texts
            kept_rows += 1
        if limit and kept_rows == limit:
            return


def _load(
    source,
    split: str | None,
    limit: int | None,
    read: Callable,
    settings: tuple,
    draw: bool = False,
) -> tuple[Dataset, dict]:
    """Clean rows of any source, with their report. Hub data are kept for the next time (key:
    `settings` and more).
    """

    def build(name: str, rows: Iterable, side: str | None) -> tuple[Dataset, dict]:
        report = CleaningReport(name)
        texts = _clean(rows, read, side, None if draw else limit, report)
        if draw:
            texts = drawn(texts, limit)
            report.drawn = len(texts) if len(texts) < report.kept else 0
        clean = _dataset(texts)
        if clean is None:
            raise DataError(f"No row is left after cleaning.\n{report}")
        return clean, vars(report)

    def from_hub() -> tuple[Dataset, dict]:
        name, hold_out, rows = hub_split(hub, split, streamed=limit is not None and not draw)
        title = f"{hub} (split {name}, revision {hub.revision[:12]})"
        return build(title, rows, split if hold_out else None)

    hub = None if isinstance(source, list) or Path(source).exists() else hub_source(str(source))
    if hub:
        hub = at_commit(hub)
        return kept((str(hub), hub.revision, split, limit, draw, *settings), from_hub)
    if split not in (None, "train", "test"):
        raise DataError(
            f"Local data are split into train and test, by prompt: there is no {split!r}."
        )
    if isinstance(source, list):
        return build("embedded rows", source, split)
    if not Path(source).exists():
        raise DataError(f"{source}: no such file or folder. Check LAB_DATA.")
    return build(Path(source).name, file_rows(Path(source)), split)


def _report(values: dict) -> CleaningReport:
    counters = {name: Counter(values[name]) for name in ("dropped", "cut")}
    return CleaningReport(**{**values, **counters})


def load_pairs(
    source,
    split: str | None = None,
    limit: int | None = None,
    score_ratio: float = SCORE_RATIO,
    draw: bool = False,
) -> tuple[Dataset, CleaningReport]:
    """Clean preference pairs with columns prompt, chosen, rejected. The columns of a row say which
    format it is.

    Args: `source`: a list of rows; a `.jsonl`, `.jsonl.gz`, `.json`, `.parquet`, `.csv` or `.tsv`
        file, or a folder of them; or a hub id, `owner/name`, `owner/name:subset` or
        `owner/name:subset@revision`. `split`: None for every row in order (of a hub id: its
        training split); "train" or "test": the hub's own split, or nine tenths and one tenth of the
        prompts where there is none, as for local data. `limit`: at most so many clean rows, the
        first ones; of a hub id no more than those is downloaded. `score_ratio`: SHP only: how many
        times the votes of the worse comment the better one must have. `draw`: the rows of `limit`
        are drawn over the whole split, as `drawn` does; the split is then read whole.
    Raises: DataError for unreadable data, an unknown format, or when no row is left.
    """
    read = partial(read_pair, score_ratio=score_ratio)
    rows, report = _load(source, split, limit, read, ("pairs", score_ratio), draw)
    return rows, _report(report)


def load_demonstrations(
    source, split: str | None = None, limit: int | None = None
) -> tuple[Dataset, CleaningReport]:
    """Clean demonstrations for SFT, with columns prompt and chosen. `source` and the rest as in
    `load_pairs`.

    Rows are Alpaca's (instruction, input, output), a message list, a prompt with a response or
    completion, or pairs, whose chosen answers are taken.
    """
    rows, report = _load(source, split, limit, read_demonstration, ("demonstrations",))
    return rows, _report(report)


def _start(tokenizer) -> list[int]:
    """What the tokenizer puts before every text: its BOS token, or nothing."""
    ids = tokenizer("")["input_ids"]
    return [] if ids == [tokenizer.eos_token_id] and tokenizer.bos_token_id is None else ids[:1]


def tokenize_response(
    prompt: str, response: str, tokenizer, max_length: int
) -> tuple[list[int], list[int], bool]:
    """(prompt ids, response ids with EOS, was it cut?). Tokenised once and split by character
    offsets.

    A response that does not fit is cut, and then gets no EOS: it did not end there.
    """
    encoded = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
    boundary = sum(end <= len(prompt) for _, end in encoded["offset_mapping"])
    ids = encoded["input_ids"]
    prompt_ids = _start(tokenizer) + ids[:boundary]
    response_ids = ids[boundary:] + [tokenizer.eos_token_id]
    room = max(max_length - len(prompt_ids), 0)
    return prompt_ids, response_ids[:room], len(response_ids) > room


def _tokenize(
    rows, tokenizer, max_length: int, sides: tuple[str, ...], source: str
) -> tuple[Dataset, CleaningReport]:
    report, kept = CleaningReport(source), []
    for row in tqdm(rows, desc="tokenising", leave=False, disable=len(rows) < 20_000):
        report.rows += 1
        parts = [
            tokenize_response(row["prompt"], row[side], tokenizer, max_length) for side in sides
        ]
        prompt_ids = (
            _start(tokenizer) + tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        )
        if len(prompt_ids) >= max_length:
            report.dropped[
                "prompt as long as the context: the response is truncated to nothing"
            ] += 1
        elif any(part[0] != prompt_ids for part in parts):
            report.dropped["a token spans the end of the prompt"] += 1
        elif len(parts) == 2 and parts[0][1] == parts[1][1]:
            report.dropped["sides equal after the cut"] += 1
        else:
            for side, part in zip(sides, parts, strict=True):
                report.cut[f"{side} response, to fit {max_length} tokens"] += part[2]
            ids = {f"{side}_ids": part[1] for side, part in zip(sides, parts, strict=True)}
            kept.append(
                {
                    **{name: row[name] for name in ("prompt", *sides)},
                    "prompt_ids": prompt_ids,
                    **ids,
                }
            )
    report.cut = +report.cut  # drop the zeros
    if not kept:
        raise DataError(
            f"No row is left after tokenisation: raise max_length or use shorter prompts.\n{report}"
        )
    return Dataset.from_list(kept), report


def tokenize_pairs(pairs, tokenizer, max_length: int) -> tuple[Dataset, CleaningReport]:
    """Adds prompt_ids, chosen_ids and rejected_ids (EOS appended, and scored later) to pairs.

    Rows whose prompt fills `max_length` are dropped, responses that do not fit are cut; both are
    counted.
    Raises: DataError when no row is left.
    """
    return _tokenize(pairs, tokenizer, max_length, ("chosen", "rejected"), "pairs")


def tokenize_demonstrations(rows, tokenizer, max_length: int) -> tuple[Dataset, CleaningReport]:
    """Like `tokenize_pairs`, for rows of prompt and chosen only."""
    return _tokenize(rows, tokenizer, max_length, ("chosen",), "demonstrations")


def tokenize_texts(texts: list[str], tokenizer, max_length: int) -> Dataset:
    """Plain texts as rows for the same loop: the "prompt" is one EOS, every token of the text is
    scored.

    Texts longer than the context are split into blocks; nothing is lost.
    """
    rows = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids = ids + [tokenizer.eos_token_id]
        blocks = [
            ids[start : start + max_length - 1] for start in range(0, len(ids), max_length - 1)
        ]
        rows += [{"prompt_ids": [tokenizer.eos_token_id], "chosen_ids": block} for block in blocks]
    return Dataset.from_list(rows)


def collate(
    rows: list[dict],
    pad_id: int = 0,
    device: str | torch.device = "cpu",
    sides: tuple = ("chosen", "rejected"),
) -> dict[str, torch.Tensor]:
    """A batch from tokenised rows: prompt and `sides` right-padded, (batch, length), with their
    lengths, (batch,).

    Masks are made from the lengths, never by comparing with the pad id, which may be the EOS that
    must be scored.
    """
    batch = {}
    for side in ("prompt", *sides):
        if f"{side}_ids" in rows[0]:
            ids = [torch.tensor(row[f"{side}_ids"]) for row in rows]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
            batch[f"{side}_ids"] = padded.to(device)
            batch[f"{side}_lengths"] = torch.tensor([len(row) for row in ids], device=device)
    return batch


def left_padded(ids: list[list[int]], pad_id: int, device="cpu") -> dict[str, torch.Tensor]:
    """Prompts for generation, (rows, longest): padded on the left, so that each ends at the right.

    Returns: input_ids and attention_mask, as `model.generate` takes them.
    """
    longest = max(map(len, ids))
    padded = [[pad_id] * (longest - len(row)) + row for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


@dataclass
class LabData:
    """All data of a lab, as text. `world` is None where the data are not the embedded world's."""

    name: str
    texts: list[str]  # base pre-training
    demonstrations: Dataset  # prompt, chosen
    train: Dataset  # prompt, chosen, rejected
    test: Dataset  # the same, held out
    prompts: list[str]  # held-out evaluation prompts
    reports: dict[str, CleaningReport]
    world: World | None = None


def load_lab_data(profile: Profile, seed: int = 0) -> LabData:
    """The data of a profile: the embedded world, or HH-RLHF or LAB_DATA (and LAB_SFT_DATA) through
    the same readers.

    Raises: DataError, as `load_pairs`.
    """
    if profile.data == WORLD:
        if profile.sft_data:
            raise DataError(
                "LAB_SFT_DATA goes with LAB_DATA: the embedded world has its own demonstrations."
            )
        world = World(profile.objects, seed)
        train, report = load_pairs(world.pairs(profile.pairs))
        test, test_report = load_pairs(world.held_out_pairs(profile.held_out))
        reports = {"train": report, "test": test_report}
        demonstrated = world.demonstrations(profile.demonstrations)
        shown = [{"prompt": row["prompt"], "chosen": row["response"]} for row in demonstrated]
        prompts = [question.prompt for question in world.questions(profile.held_out)]
        texts, demonstrations = world.plain_text(profile.plain_lines), Dataset.from_list(shown)
    else:
        world = None
        train, report = load_pairs(profile.data, "train", profile.pairs)
        test, test_report = load_pairs(profile.data, "test", profile.held_out, draw=True)
        reports = {"train": report, "test": test_report}
        demonstrations = train.select_columns(["prompt", "chosen"])
        if profile.sft_data:
            demonstrations, sft_report = load_demonstrations(
                profile.sft_data, "train", profile.pairs
            )
            reports["demonstrations"] = sft_report
        texts = [row["prompt"] + row["chosen"] for row in train]
        prompts = list(dict.fromkeys(test["prompt"]))
    hub = None if world or Path(profile.data).exists() else hub_source(profile.data)
    name = WORLD if world else str(hub).split("/")[1] if hub else Path(profile.data).name
    return LabData(
        name=name,
        texts=texts,
        demonstrations=demonstrations,
        train=train,
        test=test,
        prompts=prompts,
        reports=reports,
        world=world,
    )

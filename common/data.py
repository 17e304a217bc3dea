"""Preference data: read it, bring it to prompt/chosen/rejected, check it, tokenise it, collate it."""

import gzip
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import torch
from datasets import Dataset, load_dataset
from tqdm import tqdm

from common.profiles import WORLD, Profile
from common.toyworld import World

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
HELD_OUT_SHARE = 10  # one prompt in ten of a local file is held out
COLUMNS = ("prompt", "chosen", "rejected")
FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")


class DataError(ValueError):
    """Data that cannot be used at all. The message says what to do."""


@dataclass
class CleaningReport:
    """What cleaning did: nothing is dropped or cut without being counted here."""

    source: str
    rows: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    cut: Counter = field(default_factory=Counter)  # what was shortened -> rows

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows} rows read, {self.kept} kept"]
        lines += [f"  dropped {count:6d}  {reason}" for reason, count in sorted((+self.dropped).items())]
        lines += [f"  cut     {count:6d}  {what}" for what, count in sorted(self.cut.items())]
        return "\n".join(lines)


def split_transcript(transcript: str) -> tuple[str, str] | None:
    """(prompt, response) at the last assistant turn, or None without one. The prompt ends with that turn's mark."""
    before, mark, response = transcript.rpartition(ASSISTANT)
    return (before + mark, response) if mark else None


def as_prompt(text: str) -> str:
    """`text` as a prompt that ends at the assistant's turn, wrapped in the dialogue format if it is not yet."""
    return text.rstrip() if text.rstrip().endswith(ASSISTANT) else f"{HUMAN} {text.strip()}{ASSISTANT}"


def _as_response(text: str) -> str:
    """`text` with the one leading space that belongs to a response."""
    return " " + text.strip()


def _to_pair(row: dict[str, Any]) -> dict[str, str] | str:
    """One row as prompt/chosen/rejected, or the reason why it cannot be used."""
    if "prompt" in row:
        prompt, chosen, rejected = as_prompt(row["prompt"] or ""), row["chosen"] or "", row["rejected"] or ""
        if not (row["prompt"] or "").strip():
            return "empty prompt"
    else:
        sides = split_transcript(row["chosen"] or ""), split_transcript(row["rejected"] or "")
        if not (row["chosen"] or "").strip() or not (row["rejected"] or "").strip():
            return "empty side"
        if None in sides:
            return "no assistant turn"
        (prompt, chosen), (other, rejected) = sides
        if prompt != other:
            return "prompts that differ"
    if not chosen.strip() or not rejected.strip():
        return "empty side"
    if chosen.strip() == rejected.strip():
        return "identical sides"
    return {"prompt": prompt, "chosen": _as_response(chosen), "rejected": _as_response(rejected)}


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path.name}, line {number}: not valid JSON ({error}). Mend it.") from None
    return rows


def _read_file(path: Path) -> list[dict]:
    """Rows of one file. Raises: DataError for one that is cut off, not text, or not what its ending says."""
    try:
        return _read_by_ending(path)
    except (EOFError, OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        kind = type(error).__name__
        raise DataError(f"{path.name} cannot be read ({kind}: {error}). Fetch or write it again.") from error


def _read_by_ending(path: Path) -> list[dict]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return Dataset.from_parquet(str(path)).to_list()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    if not isinstance(rows, list):
        raise DataError(f"{path.name}: expected a JSON list of rows, found {type(rows).__name__}.")
    return rows


def _read_rows(source: str | Path | list, split: str | None) -> list[dict]:
    """Rows of a list, a local file or folder, or a hub dataset (whose own `split` is read)."""
    if isinstance(source, list):
        return source
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(FILE_ENDINGS))
        if not files:
            raise DataError(f"{path}: no {', '.join(FILE_ENDINGS)} file in this folder.")
        return [row for file in files for row in _read_file(file)]
    if path.exists():
        return _read_file(path)
    if str(source).endswith(FILE_ENDINGS) or path.is_absolute() or str(source).count("/") != 1:
        raise DataError(f"{source}: no such file or folder. Check LAB_DATA.")
    try:
        return load_dataset(str(source), split=split or "train").to_list()
    except Exception as error:  # datasets raises many kinds; each means the same to a student
        raise DataError(
            f"Could not load the dataset {source!r} from the hub ({type(error).__name__}: {error}). "
            "To go on offline, point LAB_DATA to a local file, or use LAB_PROFILE=cpu, which needs no download."
        ) from error


def _held_out(prompt: str) -> bool:
    """A fixed tenth of the prompts, by their text, so that no prompt stands on both sides of the split."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def load_pairs(source, split: str | None = None, limit: int | None = None) -> tuple[Dataset, CleaningReport]:
    """Clean preference pairs with columns prompt, chosen, rejected.

    Args: `source`: a list of rows, a `.jsonl`, `.jsonl.gz`, `.json` or `.parquet` file, a folder of them, or a hub id.
        Rows are HH-RLHF transcripts (chosen, rejected) or plain (prompt, chosen, rejected).
        `split`: None for every row in order; "train" or "test": the hub's own split, or for local data
        nine tenths and one tenth of the prompts. `limit`: at most so many clean rows.
    Raises: DataError for unreadable data, a missing column, or when no row is left.
    """
    local = isinstance(source, list) or Path(source).exists()
    rows = _read_rows(source, split)
    report = CleaningReport("embedded rows" if isinstance(source, list) else Path(source).name)
    pairs = []
    for row in rows:
        if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{report.source}: a row needs the columns chosen and rejected; this one has: {found}.")
        if wrong := [name for name in COLUMNS if not isinstance(row.get(name, ""), str | None)]:
            raise DataError(f"{report.source}: column {wrong[0]} must hold text, not {type(row[wrong[0]]).__name__}.")
        pair = _to_pair(row)
        # A row that cannot be used has no prompt; its own text decides on which side of the split it is counted.
        if local and split and _held_out(str(row) if isinstance(pair, str) else pair["prompt"]) != (split == "test"):
            continue
        report.rows += 1
        if isinstance(pair, str):
            report.dropped[pair] += 1
        else:
            pairs.append(pair)
        if limit and len(pairs) == limit:
            break
    if not pairs:
        raise DataError(f"No row is left after cleaning.\n{report}")
    return Dataset.from_list(pairs), report


def _start(tokenizer) -> list[int]:
    """What the tokenizer puts before every text: its BOS token, or nothing."""
    ids = tokenizer("")["input_ids"]
    return [] if ids == [tokenizer.eos_token_id] and tokenizer.bos_token_id is None else ids[:1]


def tokenize_response(prompt: str, response: str, tokenizer, max_length: int) -> tuple[list[int], list[int], bool]:
    """(prompt ids, response ids with EOS, was it cut?). Tokenised once and split by character offsets.

    A response that does not fit is cut, and then gets no EOS: it did not end there.
    """
    encoded = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
    boundary = sum(end <= len(prompt) for _, end in encoded["offset_mapping"])
    ids = encoded["input_ids"]
    prompt_ids = _start(tokenizer) + ids[:boundary]
    response_ids = ids[boundary:] + [tokenizer.eos_token_id]
    room = max(max_length - len(prompt_ids), 0)
    return prompt_ids, response_ids[:room], len(response_ids) > room


def _tokenize(rows, tokenizer, max_length: int, sides: tuple[str, ...], source: str) -> tuple[Dataset, CleaningReport]:
    report, kept = CleaningReport(source), []
    for row in tqdm(rows, desc="tokenising", leave=False, disable=len(rows) < 20_000):
        report.rows += 1
        parts = [tokenize_response(row["prompt"], row[side], tokenizer, max_length) for side in sides]
        prompt_ids = _start(tokenizer) + tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        if len(prompt_ids) >= max_length:
            report.dropped["prompt as long as the context: the response is truncated to nothing"] += 1
        elif any(part[0] != prompt_ids for part in parts):
            report.dropped["a token spans the end of the prompt"] += 1
        elif len(parts) == 2 and parts[0][1] == parts[1][1]:
            report.dropped["sides equal after the cut"] += 1
        else:
            for side, part in zip(sides, parts, strict=True):
                report.cut[f"{side} response, to fit {max_length} tokens"] += part[2]
            ids = {f"{side}_ids": part[1] for side, part in zip(sides, parts, strict=True)}
            kept.append({**{name: row[name] for name in ("prompt", *sides)}, "prompt_ids": prompt_ids, **ids})
    report.cut = +report.cut  # drop the zeros
    if not kept:
        raise DataError(f"No row is left after tokenisation: raise max_length or use shorter prompts.\n{report}")
    return Dataset.from_list(kept), report


def tokenize_pairs(pairs, tokenizer, max_length: int) -> tuple[Dataset, CleaningReport]:
    """Adds prompt_ids, chosen_ids and rejected_ids (EOS appended, and scored later) to pairs.

    Rows whose prompt fills `max_length` are dropped, responses that do not fit are cut; both are counted.
    Raises: DataError when no row is left.
    """
    return _tokenize(pairs, tokenizer, max_length, ("chosen", "rejected"), "pairs")


def tokenize_demonstrations(rows, tokenizer, max_length: int) -> tuple[Dataset, CleaningReport]:
    """Like `tokenize_pairs`, for rows of prompt and chosen only."""
    return _tokenize(rows, tokenizer, max_length, ("chosen",), "demonstrations")


def tokenize_texts(texts: list[str], tokenizer, max_length: int) -> Dataset:
    """Plain texts as rows for the same loop: the "prompt" is one EOS, every token of the text is scored.

    Texts longer than the context are split into blocks; nothing is lost.
    """
    rows = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids = ids + [tokenizer.eos_token_id]
        blocks = [ids[start : start + max_length - 1] for start in range(0, len(ids), max_length - 1)]
        rows += [{"prompt_ids": [tokenizer.eos_token_id], "chosen_ids": block} for block in blocks]
    return Dataset.from_list(rows)


def collate(
    rows: list[dict], pad_id: int = 0, device: str | torch.device = "cpu", sides: tuple = ("chosen", "rejected")
) -> dict[str, torch.Tensor]:
    """A batch from tokenised rows: prompt and `sides` right-padded, (batch, length), with their lengths, (batch,).

    Masks are made from the lengths, never by comparing with the pad id, which may be the EOS that must be scored.
    """
    batch = {}
    for side in ("prompt", *sides):
        if f"{side}_ids" in rows[0]:
            ids = [torch.tensor(row[f"{side}_ids"]) for row in rows]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
            batch[f"{side}_ids"] = padded.to(device)
            batch[f"{side}_lengths"] = torch.tensor([len(row) for row in ids], device=device)
    return batch


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
    """The data of a profile: the embedded world, or HH-RLHF or LAB_DATA through the same parser.

    Raises: DataError, as `load_pairs`.
    """
    if profile.data == WORLD:
        world = World(profile.objects, seed)
        train, report = load_pairs(world.pairs(profile.pairs))
        test, test_report = load_pairs(world.held_out_pairs(profile.held_out))
        demonstrated = world.demonstrations(profile.demonstrations)
        shown = [{"prompt": row["prompt"], "chosen": row["response"]} for row in demonstrated]
        prompts = [question.prompt for question in world.questions(profile.held_out)]
        texts, demonstrations = world.plain_text(profile.plain_lines), Dataset.from_list(shown)
    else:
        world = None
        train, report = load_pairs(profile.data, "train", profile.pairs)
        test, test_report = load_pairs(profile.data, "test", profile.held_out)
        demonstrations = train.select_columns(["prompt", "chosen"])
        texts = [row["prompt"] + row["chosen"] for row in train]
        prompts = list(dict.fromkeys(test["prompt"]))
    return LabData(
        name=WORLD if world else Path(profile.data).name, texts=texts, demonstrations=demonstrations, train=train,
        test=test, prompts=prompts, reports={"train": report, "test": test_report}, world=world,
    )

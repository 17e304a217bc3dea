"""Preference data: read, bring to prompt/chosen/rejected, check, tokenise, collate."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm

from common.io.cleaning import CleaningReport, clean, numbered, usable
from common.io.formats import DataError, Unusable, read_demonstration, read_pair
from common.io.templates import conversation, prompt_text, reads_transcripts
from common.profiles import INSTRUCTIONS, WORLD, Profile
from common.toyworld import World


def drawn(rows: Iterable, count: int) -> list:
    """`count` of `rows` (or all) at random, in random order; the same ones every time.

    The first rows alone may be of one kind: HH-RLHF's test split begins with 2,300 rows of one
    subset.
    """
    rows = list(rows)
    return random.Random(0).sample(rows, min(count, len(rows)))


def _load(
    source, split: str | None, limit: int | None, read: Callable
) -> tuple[Dataset, CleaningReport]:
    """Clean rows of any source, with their report. Those of the hub are kept for the next time."""
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, or None for all rows; it is {limit}.")

    def build(name: str, found: Iterable, by_prompt: bool) -> tuple[Dataset, dict]:
        report = CleaningReport(name)
        rows = usable(found, read, split if by_prompt else None, report)
        return clean(rows, limit, report), vars(report)

    if isinstance(source, list):
        if split not in (None, "train", "test"):
            raise DataError(
                f"Rows are split into train and test, by prompt: there is no {split!r}."
            )
        rows, report = build("embedded rows", numbered(source), split is not None)
    elif (path := Path(source)).exists():
        from common.io.tables import file_rows, local_files

        files, by_prompt = local_files(path, split)
        rows, report = build(path.name, file_rows(files), by_prompt)
    else:
        from common.io import hub

        if not (hosted := hub.hub_source(str(source))):
            raise DataError(f"{source}: no such file or folder. Check LAB_DATA.")
        hosted = hub.at_commit(hosted)

        def from_hub() -> tuple[Dataset, dict]:
            name, by_prompt, found = hub.hub_split(hosted, split, streamed=limit is not None)
            title = f"{hosted} (split {name}, revision {hosted.revision[:12]})"
            return build(title, numbered(found), by_prompt)

        key = (str(hosted), hosted.revision, split, limit, read.__name__)
        rows, report = hub.kept(key, from_hub)
    return rows, CleaningReport(**report)


def load_pairs(
    source, split: str | None = None, limit: int | None = None
) -> tuple[Dataset, CleaningReport]:
    """Clean preference pairs with columns prompt, chosen, rejected; a row's columns say its format.

    Args: `source`: a list of rows; a `.jsonl`, `.json`, `.csv`, `.tsv` (each also `.gz`) or
        `.parquet` file, or a folder of them; or a hub id, `owner/name`, `owner/name:subset` or
        `owner/name:subset@revision`. `split`: None for every row in order (of a hub id: its
        training split); "train" or "test": the folder's or the hub's own, or nine tenths and one
        tenth of the prompts where there is none. `limit`: at most so many clean rows, the first
        ones; of a hub id no more than those is downloaded.
    Raises: DataError for unreadable data, an unknown format, or when no row is left.
    """
    return _load(source, split, limit, read_pair)


def load_demonstrations(
    source, split: str | None = None, limit: int | None = None
) -> tuple[Dataset, CleaningReport]:
    """Clean demonstrations for SFT, with columns prompt and chosen, as `load_pairs`.

    Rows are Alpaca's (instruction, input, output), a message list, a prompt with a response or
    completion, or pairs, whose chosen answers are taken.
    """
    return _load(source, split, limit, read_demonstration)


def _start(tokenizer) -> list[int]:
    """What the tokenizer puts before every text: its BOS token, or nothing. A chat template of its
    own has written that already.
    """
    if not reads_transcripts(tokenizer):
        return []
    ids = tokenizer("")["input_ids"]
    return [] if ids == [tokenizer.eos_token_id] and tokenizer.bos_token_id is None else ids[:1]


def tokenize_prompt(prompt: str, tokenizer) -> list[int]:
    """The ids of a prompt, in the template that the tokenizer carries: what a model answers.

    Raises: Unusable where the template refuses it.
    """
    text = prompt_text(prompt, tokenizer)
    return _start(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenize_response(
    prompt: str, response: str, tokenizer, max_length: int
) -> tuple[list[int], list[int], bool]:
    """(prompt ids, response ids with EOS, was it cut?). Tokenised once, split by character offsets.

    They are the tokens of the whole conversation in the template that the tokenizer carries, up to
    and with the answer's end token. A response that does not fit is cut, and then gets no EOS: it
    did not end there.
    Raises: Unusable where the template refuses it.
    """
    prompt, response = conversation(prompt, response, tokenizer)
    encoded = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
    boundary = sum(end <= len(prompt) for _, end in encoded["offset_mapping"])
    ids = encoded["input_ids"]
    prompt_ids = _start(tokenizer) + ids[:boundary]
    response_ids = ids[boundary:] + [tokenizer.eos_token_id]
    room = max(max_length - len(prompt_ids), 0)
    return prompt_ids, response_ids[:room], len(response_ids) > room


def _tokenized(
    row: dict, tokenizer, max_length: int, sides: tuple[str, ...]
) -> tuple[dict, list[str]]:
    """(ids of a row's prompt and sides, the sides that were cut).

    Raises: Unusable for a row that cannot be trained on.
    """
    prompt_ids = tokenize_prompt(row["prompt"], tokenizer)
    if not prompt_ids:
        # Nothing predicts the first token of the response: its log-probability is undefined.
        raise Unusable("empty prompt")
    if len(prompt_ids) >= max_length:
        raise Unusable("prompt as long as the context: the response is truncated to nothing")
    parts = [tokenize_response(row["prompt"], row[side], tokenizer, max_length) for side in sides]
    if any(part[0] != prompt_ids for part in parts):
        raise Unusable("a token spans the end of the prompt")
    if len(parts) == 2 and parts[0][1] == parts[1][1]:
        raise Unusable("sides equal after the cut")
    tokens = {f"{side}_ids": part[1] for side, part in zip(sides, parts, strict=True)}
    was_cut = [side for side, part in zip(sides, parts, strict=True) if part[2]]
    return {"prompt_ids": prompt_ids, **tokens}, was_cut


def _tokenize(
    rows, tokenizer, max_length: int, sides: tuple[str, ...]
) -> tuple[Dataset, CleaningReport]:
    report, kept = CleaningReport("pairs" if len(sides) == 2 else "demonstrations"), []
    for row in tqdm(rows, desc="tokenising", leave=False, disable=len(rows) < 20_000):
        report.rows += 1
        try:
            tokens, was_cut = _tokenized(row, tokenizer, max_length, sides)
        except Unusable as reason:
            report.dropped[str(reason)] += 1
            continue
        report.cut.update(f"{side} response, to fit {max_length} tokens" for side in was_cut)
        kept.append({name: row[name] for name in ("prompt", *sides)} | tokens)
    if not kept:
        advice = "raise max_length or use shorter prompts."
        raise DataError(f"No row is left after tokenisation: {advice}\n{report}")
    return Dataset.from_list(kept), report


def tokenize_pairs(pairs, tokenizer, max_length: int) -> tuple[Dataset, CleaningReport]:
    """Adds prompt_ids, chosen_ids and rejected_ids (EOS appended, and scored later) to pairs.

    Rows whose prompt is empty or fills `max_length` are dropped, responses that do not fit are cut;
    both are counted.
    Raises: DataError when no row is left.
    """
    return _tokenize(pairs, tokenizer, max_length, ("chosen", "rejected"))


def tokenize_demonstrations(rows, tokenizer, max_length: int) -> tuple[Dataset, CleaningReport]:
    """Like `tokenize_pairs`, for rows of prompt and chosen only."""
    return _tokenize(rows, tokenizer, max_length, ("chosen",))


def tokenize_texts(texts: list[str], tokenizer, max_length: int) -> Dataset:
    """Plain texts as rows for the same loop: the "prompt" is one EOS, every token is scored.

    Texts longer than the context are split into blocks; nothing is lost.
    """
    rows, size, eos = [], max_length - 1, tokenizer.eos_token_id
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids = ids + [eos]
        blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
        rows += [{"prompt_ids": [eos], "chosen_ids": block} for block in blocks]
    return Dataset.from_list(rows)


def collate(
    rows: list[dict],
    pad_id: int = 0,
    device: str | torch.device = "cpu",
    sides: tuple = ("chosen", "rejected"),
) -> dict[str, torch.Tensor]:
    """A batch from tokenised rows: prompt and `sides` right-padded, with their lengths.

    Returns: `<side>_ids` (batch, length) and `<side>_lengths` (batch,). Masks are made from the
    lengths, never by comparing with the pad id, which may be the EOS that must be scored.
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
    world: World | None = None  # or `common.instructions.Instructions`


def load_lab_data(profile: Profile, seed: int = 0) -> LabData:
    """The data of a profile: an embedded world, or LAB_DATA (and LAB_SFT_DATA), or HH-RLHF.

    All go through the same readers. Raises: DataError, as `load_pairs`.
    """
    if profile.data in (WORLD, INSTRUCTIONS):
        return _embedded(profile, seed)
    train, report = load_pairs(profile.data, "train", profile.pairs)
    test, test_report = load_pairs(profile.data, "test")
    chosen = drawn(range(len(test)), profile.held_out)
    test_report.drawn = len(chosen) if len(chosen) < len(test) else 0
    test = test.select(chosen)
    reports = {"train": report, "test": test_report}
    demonstrations = train.select_columns(["prompt", "chosen"])
    if profile.sft_data:
        found = load_demonstrations(profile.sft_data, "train", profile.pairs)
        demonstrations, reports["demonstrations"] = found
    # Of a hub id, what stands between the owner and the revision.
    local = Path(profile.data).exists()
    name = Path(profile.data).name if local else profile.data.partition("@")[0].partition("/")[2]
    texts = [row["prompt"] + row["chosen"] for row in train]
    prompts = list(dict.fromkeys(test["prompt"]))
    return LabData(name, texts, demonstrations, train, test, prompts, reports)


def _embedded(profile: Profile, seed: int) -> LabData:
    if profile.sft_data:
        advice = "an embedded world has its own demonstrations."
        raise DataError(f"LAB_SFT_DATA goes with LAB_DATA: {advice}")
    if profile.data == WORLD:
        world = World(profile.objects, seed)
        texts = world.plain_text(profile.plain_lines)
        shown = world.demonstrations(profile.demonstrations)
        shown = [{"prompt": row["prompt"], "chosen": row["response"]} for row in shown]
    else:
        from common.instructions import Instructions

        # Verified answers only. There is nothing to pre-train on: the model is pre-trained.
        world, texts = Instructions(seed), []
        shown = load_pairs(world.pairs(profile.pairs, flaw_rate=0.0))[0]
        shown = shown.select_columns(["prompt", "chosen"]).to_list()
    train, report = load_pairs(world.pairs(profile.pairs))
    test, test_report = load_pairs(world.held_out_pairs(profile.held_out))
    return LabData(
        name=profile.data,
        texts=texts,
        demonstrations=Dataset.from_list(shown),
        train=train,
        test=test,
        prompts=[question.prompt for question in world.questions(profile.held_out)],
        reports={"train": report, "test": test_report},
        world=world,
    )

"""Checks of the exercises of notebook 1.7-01.

The expected values are computed here, by another route than the worked answers.
"""

import copy
import random

import torch


def check_split_transcript(split):
    turns = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is the tea?\n\nAssistant:"
    result = split(turns + " In the kitchen.")
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    yield "it returns a prompt and a response", is_pair
    prompt, response = result
    yield "the prompt ends at the last assistant turn, not at the first", prompt == turns
    yield "the response keeps its leading space", response == " In the kitchen."
    echo = turns + " You said: Hi. Where is the tea? In the kitchen."
    yield "prompt + response is the transcript again, word for word", "".join(split(echo)) == echo
    told = turns + " Write Human: and Assistant: before each turn."
    bare = tuple(split(told)) == (turns, told.removeprefix(turns))
    yield "the word Assistant: inside of an answer is no turn: the blank line belongs to it", bare
    empty = tuple(split(turns))
    yield "a transcript that ends at the mark has an empty response", empty == (turns, "")
    others = [split("\n\nHuman: Hi"), split("")]
    yield "without an assistant turn it returns None", others == [None, None]


def check_response_mask(mask):
    prompts, responses = [2, 4, 1], [3, 1, 5]
    result = mask(torch.tensor(prompts), torch.tensor(responses))
    is_boolean = isinstance(result, torch.Tensor) and result.dtype == torch.bool
    yield "it is a tensor of booleans", is_boolean
    yield "its shape is (rows, longest prompt + response)", result.shape == (3, 6)
    marked = [[place for place, on in enumerate(row) if on] for row in result.tolist()]
    counts = [len(row) for row in marked]
    yield "as many tokens are marked as the responses have, EOS counted", counts == responses
    after = [row[0] >= start for row, start in zip(marked, prompts, strict=True)]
    yield "no prompt token is marked", all(after)
    yield "no padding is marked", marked == [[2, 3, 4], [4], [1, 2, 3, 4, 5]]
    alone = mask(torch.tensor([3]), torch.tensor([2])).tolist()
    yield "a single row works too", alone == [[False, False, False, True, True]]


def check_deduplicate(deduplicate):
    def row(prompt, chosen, rejected):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    good, other = row("p", "a", "b"), row("q", "a", "b")
    turned = row("p", "b", "a")
    kept, dropped = deduplicate([good, other])
    yield "rows that differ in their prompt only are kept, in order", kept == [good, other]
    yield "nothing dropped, nothing counted", sum(dropped.values()) == 0
    kept, dropped = deduplicate([good, dict(good), other, dict(good)])
    yield "of equal rows the first one stays", kept == [good, other]
    counts = dropped["duplicate"], sum(dropped.values())
    yield 'the others are counted as "duplicate"', counts == (2, 2)
    kept, dropped = deduplicate([good, other, turned])
    yield "of two rows with the same answers in both orders, neither stays", kept == [other]
    counts = dropped["contradiction"], sum(dropped.values())
    yield 'they are counted as "contradiction"', counts == (2, 2)
    rows = [good, turned, dict(good), other, dict(other)]
    before = [dict(entry) for entry in rows]
    kept, dropped = deduplicate(rows)
    counts = {"contradiction": 3, "duplicate": 1}
    yield "a contradicted row is no duplicate, however often it occurs", dict(dropped) == counts
    yield "rows read = rows kept + rows dropped", len(rows) == len(kept) + sum(dropped.values())
    yield "the input is left as it was", rows == before


def check_preference_collator(collate):
    draw = random.Random()
    sizes = {"prompt": (3, 7, 5), "chosen": (4, 1, 2), "rejected": (2, 6, 9)}
    end = 40  # EOS, and the pad id too
    rows = [
        {f"{side}_ids": [draw.randint(1, 39) for _ in range(n[k])] for side, n in sizes.items()}
        for k in range(3)
    ]
    for row in rows:
        row["chosen_ids"][-1] = row["rejected_ids"][-1] = end
    before = copy.deepcopy(rows)
    batch = collate(rows, end)
    names = {f"{side}_{what}" for side in sizes for what in ("ids", "lengths")}
    yield "it returns ids and lengths of prompt, chosen and rejected", set(batch) == names
    whole = all(isinstance(t, torch.Tensor) and t.dtype == torch.int64 for t in batch.values())
    yield "they are tensors of whole numbers (int64)", whole
    shapes = {side: tuple(batch[f"{side}_ids"].shape) for side in sizes}
    longest = {side: (3, max(n)) for side, n in sizes.items()}
    yield "ids: (rows, longest), each of the three with its own longest", shapes == longest
    lengths = {side: tuple(batch[f"{side}_lengths"].tolist()) for side in sizes}
    yield "lengths count the true tokens, EOS too, although EOS is the pad id", lengths == sizes
    starts = all(
        batch[f"{side}_ids"][k, : n[k]].tolist() == before[k][f"{side}_ids"]
        for side, n in sizes.items()
        for k in range(3)
    )
    yield "each row begins with its own ids: padding is on the right", starts
    rest = [batch[f"{side}_ids"][k, n[k] :] for side, n in sizes.items() for k in range(3)]
    yield (
        "all the rest is the pad id that was given",
        all(bool((part == end).all()) for part in rest),
    )
    other = collate(rows, 7)["prompt_ids"][0, 3:].tolist()
    yield "another pad id is used as well", other == [7] * 4
    yield "the rows are left as they were", rows == before
    one = collate(rows[:1], end)
    yield "a single row works, without padding", tuple(one["rejected_ids"].shape) == (1, 2)

"""Checks of the exercises of notebook 1.7-02.

The expected values are computed here, by another route than the worked answers: token by token, a
row at a time. The models are GPT-2s with random weights and a vocabulary of 23 tokens.
"""

import copy
import random

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.checks import close
from common.data import collate
from common.logprobs import response_logps
from common.losses import sft_loss

_WORDS, _END = 23, 22


def _model(dtype=torch.float64):
    """A GPT-2 whose probabilities are far from uniform, in evaluation mode."""
    sizes = {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "initializer_range": 0.8}
    with torch.random.fork_rng():
        config = GPT2Config(vocab_size=_WORDS, bos_token_id=_END, eos_token_id=_END, **sizes)
        return GPT2LMHeadModel(config).to(dtype).eval()


def _rows() -> list[dict]:
    """Prompts and answers of unequal lengths, EOS at the end, no row the longest in both."""
    draw = random.Random()
    sizes = [(5, 2), (2, 7), (3, 4)]
    return [
        {
            "prompt_ids": [draw.randrange(_END) for _ in range(prompt)],
            "chosen_ids": [draw.randrange(_END) for _ in range(answer - 1)] + [_END],
        }
        for prompt, answer in sizes
    ]


def _labelled(rows: list[dict], pad: int = _END) -> dict[str, torch.Tensor]:
    whole = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
    longest = max(map(len, whole))
    ids, mask = (torch.full((len(rows), longest), value) for value in (pad, 0))
    labels = torch.full_like(ids, -100)
    for k, row in enumerate(rows):
        ids[k, : len(whole[k])], mask[k, : len(whole[k])] = torch.tensor(whole[k]), 1
        labels[k, len(row["prompt_ids"]) : len(whole[k])] = torch.tensor(row["chosen_ids"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def _token_logps(model, row: dict) -> list[float]:
    """log p of each token of a row's answer, the row alone."""
    ids, start = row["prompt_ids"] + row["chosen_ids"], len(row["prompt_ids"])
    logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(logps[place - 1, ids[place]]) for place in range(start, len(ids))]


def check_sft_labels(fn):
    rows = _rows()
    before, expected = copy.deepcopy(rows), _labelled(rows)
    found = fn(rows, _END)
    names = {"input_ids", "attention_mask", "labels"}
    yield "it returns input_ids, attention_mask and labels", set(found) == names
    tensors = all(isinstance(value, torch.Tensor) for value in found.values())
    yield "they are tensors", tensors
    whole = found["input_ids"].dtype == found["labels"].dtype == torch.int64
    yield "ids and labels are whole numbers (int64)", whole
    shapes = {tuple(value.shape) for value in found.values()}
    yield "each has the shape (rows, longest prompt + answer)", shapes == {(3, 9)}
    same = {name: found[name].long().equal(expected[name]) for name in names}
    yield "prompt, answer, then padding on the right", same["input_ids"]
    yield "the mask is 1 at real tokens, EOS included, and 0 at pads", same["attention_mask"]
    labels = found["labels"]
    scored = [row[row != -100].tolist() for row in labels]
    answers = [row["chosen_ids"] for row in rows]
    yield "the labels that are not -100 are the answer's tokens, with EOS", scored == answers
    yield "they stand where the tokens stand: the shift belongs to the loss", same["labels"]
    other = fn(rows, 7)
    yield "another pad id changes the ids and no label", bool((other["labels"] == labels).all())
    yield "and it is used", other["input_ids"][0, -1] == 7
    yield "a single row works", tuple(fn(rows[:1], _END)["labels"].shape) == (1, 7)
    yield "the rows are left as they were", rows == before


def check_sft_loss(fn):
    model, rows = _model(), _rows()
    batch = _labelled(rows)
    before = {name: value.clone() for name, value in batch.items()}
    found = fn(model, batch)

    def gives(expected, tolerance=1e-9, model=model, **changes):
        value = torch.as_tensor(fn(model, batch | changes)).detach()
        return close(float(value), expected, tolerance)

    yield "it is a scalar tensor", isinstance(found, torch.Tensor) and found.numel() == 1
    tokens = [_token_logps(model, row) for row in rows]
    nll = -sum(map(sum, tokens)) / sum(map(len, tokens))
    first = gives(-sum(tokens[0]) / len(tokens[0]), **_labelled(rows[:1]))
    yield "a row alone: the mean negative log-probability of its answer's tokens", first
    yield "rows together: every token counts the same, not every row", gives(nll)
    other_pads = _labelled(rows, pad=3)["input_ids"]
    yield "what the pads are does not count", gives(nll, input_ids=other_pads)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(found, weights)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:])
    right = torch.autograd.grad(expected, weights)
    same = all(close(a, b, 1e-9) for a, b in zip(gradients, right, strict=True))
    yield "its gradient reaches every weight, and is that of the cross-entropy", same
    yield "in float32 too", gives(nll, 1e-4, model=copy.deepcopy(model).float())
    pairs = response_logps(model, collate(rows)).chosen
    ours = float(sft_loss(pairs.sums, pairs.lengths).detach())
    yield "it equals the loss of `common`, which training uses, to 1e-12", gives(ours, 1e-12)
    left = all(batch[name].equal(value) for name, value in before.items())
    yield "the batch is left as it was", left


def check_batched_response_logps(fn):
    model, rows = _model(), _rows()
    batch = collate(rows, pad_id=_END)
    before = {name: value.clone() for name, value in batch.items()}
    with torch.no_grad():
        found = fn(model, batch)
    yield "it returns one number a row: shape (batch,)", tuple(found.shape) == (3,)
    expected = [sum(_token_logps(model, row)) for row in rows]
    yield "each is the sum over the answer's tokens, EOS included", close(found, expected, 1e-9)
    for k, row in enumerate(rows):
        with torch.no_grad():
            alone = fn(model, collate([row], pad_id=_END))
        same = close(alone, expected[k : k + 1], 1e-9)
        yield f"row {k + 1} alone has the same log-probability", same
    with torch.no_grad():
        other = fn(model, collate(rows[::-1], pad_id=4))
    yield "order and pad id do not count", close(other, expected[::-1], 1e-9)
    with torch.no_grad():
        small = fn(copy.deepcopy(model).float(), batch)
    wide = small.dtype in (torch.float32, torch.float64)
    yield "a float32 model: the same to 1e-4", wide and close(small, expected, 1e-4)
    gradient = torch.autograd.grad(fn(model, batch).sum(), model.transformer.wte.weight)[0]
    yield "a gradient reaches the weights", bool(gradient.abs().sum() > 0)
    left = all(batch[name].equal(value) for name, value in before.items())
    yield "the batch is left as it was", left


def check_freeze_reference(fn):
    model, ids = _model().train(), torch.tensor([[1, 5, 2]])
    model.transformer.wpe.weight.requires_grad_(False)
    states = [weight.requires_grad for weight in model.parameters()]
    reference = fn(model)
    is_model = isinstance(reference, torch.nn.Module) and reference is not model
    yield "it is another model, not the same one", is_model
    yield "it is in evaluation mode", not any(part.training for part in reference.modules())
    frozen = not any(weight.requires_grad for weight in reference.parameters())
    yield "none of its parameters takes a gradient", frozen
    weights = zip(model.parameters(), reference.parameters(), strict=True)
    yield "its weights are equal to the model's", all(torch.equal(a, b) for a, b in weights)
    places = [{weight.data_ptr() for weight in m.parameters()} for m in (model, reference)]
    yield "no weight is shared in memory", not places[0] & places[1]
    before = reference(ids).logits
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5)
    yield "a step of the model leaves it alone", torch.equal(reference(ids).logits, before)
    kept = [weight.requires_grad for weight in model.parameters()] == states
    yield "the model itself still trains as it did", kept and model.training


def check_best_checkpoint(fn):
    nan, losses = float("nan"), [5.0, 3.0, 2.0, 2.5, 2.4, 1.0]

    def gives(values, patience, expected):
        return tuple(fn(values, patience)) == expected

    yield "patience 0 never stops, and keeps the lowest loss of all", gives(losses, 0, (5, 5))
    yield "patience 2 stops after two evaluations without a better loss", gives(losses, 2, (2, 4))
    yield "patience 3 lives to see the better one", gives(losses, 3, (5, 5))
    again = gives([3.0, 4.0, 2.0, 4.0, 1.0], 2, (4, 4))
    yield "a better loss sets the count back to 0", again
    yield "an equal loss is not a better one: the first stays", gives([2.0] * 3, 2, (0, 2))
    worse = gives([1.0, 2.0, 3.0, 4.0], 1, (0, 1))
    yield "where it only gets worse, the model before training is kept", worse
    yield (
        "a NaN is never better",
        gives([2.0, nan, 1.0], 0, (2, 2)) and gives([2.0, nan], 0, (0, 1)),
    )
    yield "not even at the start", gives([nan, 3.0, 4.0], 0, (1, 2))
    yield "a NaN costs patience as a worse loss does", gives([2.0, nan, nan, 1.0], 2, (0, 2))

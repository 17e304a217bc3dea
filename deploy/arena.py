"""A page where people vote: `python -m deploy.arena --a runs/cpu/sft --b runs/cpu/dpo`.

A prompt, two answers without names, four buttons (or the keys A, B, T, X; N for the next pair). The
names are shown after the vote. It listens on this machine only, and reports to nobody.
"""

import argparse
import json
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.middleware import Middleware

from common.evaluation import Sampling, generate
from common.io.fingerprints import digest
from common.io.formats import messages_of
from common.judges import Judge, RuleJudge
from common.judging.agreement import agreement
from common.judging.people import People
from common.judging.ratings import rating_intervals
from common.lab import Lab
from common.models import ModelError, load_model, load_tokenizer
from common.profiles import get_profile
from deploy.serving.guard import SERVER, Guard
from deploy.serving.page import OPEN_PATHS
from deploy.serving.store import chance
from deploy.votes import VoteStore, matches_of

ENOUGH = 30  # votes, before agreement with the rule is shown
EXPORT = "/votes.jsonl"
ARENA_PATHS = re.compile(f"{OPEN_PATHS.pattern}|{re.escape(EXPORT)}")
BUTTONS = {  # choice → (its label, its key)
    "left": ("A is better", "a"),
    "right": ("B is better", "b"),
    "tie": ("A tie", "t"),
    "both bad": ("Both bad", "x"),
}
# A key presses its button. Nothing is fetched: the script stands in the page itself.
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const name = {a: "left", b: "right", t: "tie", x: "both-bad", n: "next"}[event.key.toLowerCase()];
  const button = name && document.getElementById("vote-" + name);
  if (button && !button.disabled) button.click();
});
</script>"""


class ArenaError(ValueError):
    """The two models cannot be compared. The message says what to do."""


def _run(folder: Path) -> dict:
    """`run.json` of a finished run. Raises: ArenaError."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArenaError(f"{folder} holds no finished run ({error}). Train it first.") from error


def lab_of(a: Path, b: Path) -> Lab:
    """The lab in which both runs were made: its profile, seed and data. Raises: ArenaError."""
    runs = [_run(folder) for folder in (a, b)]
    same = ("profile", "seed", "dataset")
    if any(runs[0][name] != runs[1][name] for name in same) or a.resolve() == b.resolve():
        said = ["/".join(str(run[name]) for name in same) for run in runs]
        raise ArenaError(f"Two runs of one profile, seed and data set are needed, not {said}.")
    return Lab(get_profile(runs[0]["profile"].split("@")[0]), runs[0]["seed"])


def make_pairs_of(a: Path, b: Path, lab: Lab, store: VoteStore, count: int) -> str:
    """Puts answers of both models to `count` held-out prompts into the store, once.

    Answers that are equal word for word are left out: nobody can prefer one of them.
    Returns: the pairs' source, by which the store finds them. Raises: ArenaError, ModelError.
    """
    prints = [_run(folder)["fingerprint"] for folder in (a, b)]
    source = digest([prints, count])
    if store.pairs(source):
        return source
    names = [folder.name for folder in (a, b)]
    if names[0] == names[1]:  # the same stage of two folders
        names = ["/".join(folder.parts[-2:]) for folder in (a, b)]
    lab.tokenizer = load_tokenizer(a, lab.profile.template)  # the run's own: nothing is trained
    prompts, texts = lab.prompts[:count], []
    sampling = Sampling(lab.profile.max_new_tokens, seed=lab.seed)
    for folder, name in zip((a, b), names, strict=True):
        print(f"{name} answers {len(prompts)} prompts …", flush=True)
        model = load_model(folder, lab.profile).eval()
        groups = generate(model, lab.tokenizer, prompts, sampling)
        texts.append([group[0].text.strip() for group in groups])
    rows, columns = [], ("prompt", "model_a", "model_b", "text_a", "text_b")
    for prompt, one, other in zip(prompts, *texts, strict=True):
        if one != other:
            rows.append(dict(zip(columns, (prompt, *names, one, other), strict=True)))
    print(f"{len(rows)} pairs ({len(prompts) - len(rows)} of equal answers left out)", flush=True)
    if not rows:
        raise ArenaError("Both models give the same answers to every prompt: nothing to vote on.")
    store.add_pairs(source, rows)
    return source


@dataclass
class Arena:
    """The pairs of one source, who sees which next, and how the votes stand."""

    store: VoteStore
    source: str
    rule: Judge | None = None  # None: this data set has no rule

    def next_pair(self, voter: str) -> tuple[dict | None, int, int]:
        """(the next pair of this voter or None, votes so far, pairs in all). `a_is_left` in the
        pair tells its sides.

        Order and sides look random, and stay the same for one voter: a reload shows the same.
        """
        pairs, voted = self.store.pairs(self.source), set()
        for row in self.store.votes(self.source):
            if row["voter"] == voter:
                voted.add(row["pair"])
        left = [row for row in pairs if row["id"] not in voted]
        if not left:
            return None, len(voted), len(pairs)
        pair = min(left, key=lambda row: chance("order", voter, str(row["id"])))
        a_is_left = chance("side", voter, str(pair["id"])) < 0.5
        return pair | {"a_is_left": a_is_left}, len(voted), len(pairs)

    def standing(self) -> str:
        """Ratings with intervals and, after `ENOUGH` votes, the agreement with the rule.

        How the rule judged one pair is never shown: whoever knows it votes like it.
        """
        votes = self.store.votes(self.source)
        if not votes:
            return "No vote yet."
        people = People(votes)
        lines = [f"{people.name}. Bradley-Terry points with 95 % intervals:"]
        for name, row in rating_intervals(*matches_of(votes), resamples=200).items():
            low, high = row["ci95"]
            lines.append(f"{name}: {row['points']:.0f} [{low:.0f}, {high:.0f}]")
        if self.rule is None:
            lines.append("κ with a rule: not measured (this data set has none)")
        elif len(votes) < ENOUGH:
            lines.append(f"κ with {self.rule.name}: after {ENOUGH} votes")
        else:
            found = agreement([self.rule, people], people.questions)[1]["kappa"]
            value, (low, high) = found or (float("nan"), (float("nan"), float("nan")))
            lines.append(f"κ with {self.rule.name}: {value:.2f} [{low:.2f}, {high:.2f}]")
        return "\n".join(lines)


def talk_text(prompt: str) -> str:
    """A prompt as people read it: one message as it is, a longer talk with its speakers."""
    turns = messages_of(prompt)
    said = [f"{turn['role']}: {turn['content']}" for turn in turns]
    return turns[0]["content"] if len(turns) == 1 else "\n\n".join(said)


def build_arena(arena: Arena) -> FastAPI:
    """The page as an app, for this machine alone."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    def done_text(voter: str) -> str:
        pair, done, count = arena.next_pair(voter)
        said = f"{done} of {count} pairs judged"
        return said if pair else f"{said}: thank you, that is all."

    def show(voter: str):
        """The next pair: what stands in every component."""
        pair, texts = arena.next_pair(voter)[0], ("", "", "")
        if pair is not None:
            sides = ("a", "b") if pair["a_is_left"] else ("b", "a")
            texts = talk_text(pair["prompt"]), *(pair[f"text_{side}"] for side in sides)
        buttons = [gr.Button(interactive=pair is not None)] * len(BUTTONS)
        return pair, done_text(voter), *texts, "", gr.Button(interactive=False), *buttons

    def start(voter: str | None):
        voter = voter or uuid4().hex
        return voter, *show(voter), arena.standing()

    def cast(choice: str):
        def vote(pair: dict | None, voter: str):
            off = [gr.Button(interactive=False)] * len(BUTTONS)
            if pair is None:
                return "", gr.Textbox(), gr.Button(), *off
            choice_kept, a_left = arena.store.vote(pair["id"], voter, pair["a_is_left"], choice)
            names = (pair["model_a"], pair["model_b"])[:: 1 if a_left else -1]
            said = f"Kept: {BUTTONS[choice_kept][0]}. A was {names[0]}, B was {names[1]}."
            return said, done_text(voter), gr.Button(interactive=True), *off

        return vote

    with gr.Blocks(title="Which answer is better?", analytics_enabled=False) as page:
        # The browser keeps a random name, so that a reload goes on where it was.
        voter = gr.BrowserState(None, storage_key="lab-arena-voter", secret="not a secret")
        pair = gr.State(None)
        progress = gr.Textbox(show_label=False, interactive=False, elem_id="progress")
        # Text boxes show text: an answer that holds HTML or Markdown changes nothing here.
        prompt = gr.Textbox(label="The person said", interactive=False, elem_id="prompt")
        sizes = {"lines": 6, "max_lines": 20, "interactive": False}
        with gr.Row():
            left = gr.Textbox(label="Answer A", elem_id="left", **sizes)
            right = gr.Textbox(label="Answer B", elem_id="right", **sizes)
        with gr.Row():
            buttons = []
            for choice, (label, key) in BUTTONS.items():
                name = f"vote-{choice.replace(' ', '-')}"
                buttons.append(gr.Button(f"{label} ({key.upper()})", elem_id=name))
        said = gr.Textbox(label="Your vote", interactive=False, elem_id="said")
        following = gr.Button("Next pair (N)", variant="primary", elem_id="vote-next")
        standing = gr.Textbox(label="All votes so far", lines=4, interactive=False, elem_id="all")
        gr.Button("Save all votes", link=EXPORT, link_target="_blank", size="sm")
        shown = [pair, progress, prompt, left, right, said, following, *buttons]
        page.load(start, [voter], [voter, *shown, standing])
        following.click(show, [voter], shown)
        for choice, button in zip(BUTTONS, buttons, strict=True):
            kept = button.click(cast(choice), [pair, voter], [said, progress, following, *buttons])
            kept.then(arena.standing, None, standing)

    guard = [Middleware(Guard, paths=ARENA_PATHS)]
    app = FastAPI(middleware=guard, openapi_url=None, max_body_size=1_000_000)

    @app.get(EXPORT)
    def export() -> PlainTextResponse:
        rows = (json.dumps(row, ensure_ascii=False) for row in arena.store.votes(arena.source))
        return PlainTextResponse("".join(f"{row}\n" for row in rows))

    settings = {"ssr_mode": False, "footer_links": [], "enable_monitoring": False, "head": KEYS}
    return gr.mount_gradio_app(app, page, "/", server_name="127.0.0.1", **settings)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    about, shown = __doc__.split("\n")[0], "(default: %(default)s)"
    parser = argparse.ArgumentParser("python -m deploy.arena", description=about)
    parser.add_argument("--a", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--b", type=Path, required=True, help="another one, of the same profile")
    parser.add_argument("--prompts", type=int, default=60, help=f"held-out prompts {shown}")
    parser.add_argument("--store", type=Path, help="file of the votes (default: beside run A)")
    parser.add_argument("--port", type=int, default=7861, help=f"0 for a free one {shown}")
    given = parser.parse_args(arguments)
    try:
        lab = lab_of(given.a, given.b)
        store = VoteStore(given.store or given.a.parent / "votes.sqlite")
        source = make_pairs_of(given.a, given.b, lab, store, given.prompts)
        world = lab.data.world
        arena = Arena(store, source, RuleJudge(world) if world else None)
        listener = socket.create_server(("127.0.0.1", given.port))
    except (ArenaError, ModelError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("vote on http://{}:{}".format(*listener.getsockname()), flush=True)
    app = build_arena(arena)
    own = SERVER | {"log_level": "critical", "timeout_graceful_shutdown": 1}
    uvicorn.Server(uvicorn.Config(app, **own)).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Serves the voting page on made-up pairs, as a process that a test can kill; nothing here is under
test: `python tests/arena_page.py STORE`.
"""

import sys
import time
from pathlib import Path

from common.judges import Vote
from deploy.arena import Arena, build_arena
from deploy.votes import VoteStore

NAMES = ("model-one", "model-two")
IMAGE = "<img src='http://evil.example/x.png'> **bold** & <script>document.title = 'taken'</script>"


class Longer:
    """The longer answer is better."""

    name = "the longer one"

    def prefer(self, questions):
        return [Vote((len(a) > len(b)) - (len(a) < len(b))) for _, a, b in questions]


def made_up(count: int = 40) -> list[dict]:
    """Pairs in which both models give the longer answer to half of the prompts. The first holds
    HTML.
    """
    rows = []
    for at in range(count):
        long, short = f"a long answer to {at}, and more of it", f"short {at}"
        texts = (long, short) if at % 2 else (short, long)
        if at == 0:
            texts = (IMAGE, short)
        row = {"prompt": f"\n\nHuman: Question {at}?\n\nAssistant:"}
        row |= dict(zip(("model_a", "model_b"), NAMES, strict=True))
        rows.append(row | dict(zip(("text_a", "text_b"), texts, strict=True)))
    return rows


def arena_of(path: Path, count: int = 40) -> Arena:
    store = VoteStore(path)
    store.add_pairs("made up", made_up(count))
    return Arena(store, "made up", Longer())


if __name__ == "__main__":
    from serving_tools import running

    with running(build_arena(arena_of(Path(sys.argv[1])))) as address:
        print(address, flush=True)
        time.sleep(600)

"""A language model as a judge: what it is asked, how strictly it is read, and what came of it."""

import re
import tomllib
from collections import Counter
from pathlib import Path

from common.io.endpoint import Endpoint, bill
from common.io.formats import messages_of
from common.judges import Vote

PROMPTS = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))
LETTERS = {"A": 1, "B": -1, "C": 0}
FORMS = {"pairwise": "([ABC])", "forced": "([AB])", "single": "(10|[1-9])"}  # that each form allows


def marked(text: str, pattern: str) -> tuple[str | None, str]:
    """(what stands in [[…]] on the last line, the reasons before it).

    Args: `pattern`: a regular expression of what may stand there, in one group.
    Returns: (None, what is wrong) for anything but one mark, alone on the last line: a verdict
        inside a sentence may be a quotation, and of two nobody knows which one counts.
    """
    lines = text.strip().splitlines() or [""]
    marks = re.findall(r"\[\[.*?\]\]", text)
    found = re.fullmatch(rf"\W*(?:\w+:\W*)?\[\[{pattern}\]\]\W*", lines[-1])
    if found and len(marks) == 1:
        return found[1], " ".join(lines[:-1]).strip()
    problem = "no verdict" if not marks else "several verdicts"
    if len(marks) == 1:
        problem = "the verdict is none of those asked for, or in the wrong place"
    return None, f"{problem}: {' '.join(text.split())[:120]!r}"


class LanguageJudge:
    """A language model behind an endpoint, asked in one of three forms.

    "pairwise": two answers at once, reasons, then a verdict, a tie being one; "single": a grade for
    each answer alone (both: Zheng et al. 2023, MT-Bench, Sec. 3.1); "forced": two answers, no
    reasons and no tie, after two examples, for models too small to keep to the form.
    `counts` says what became of every question that was asked: "read", "not readable" or "failed";
    `spent` what it cost. What was asked before is read from the endpoint's folder. A question that
    failed counts as a tie that is not clear, too.
    Raises: ValueError for another form; in `prefer`, EndpointError where the endpoint cannot be
        used at all.
    """

    def __init__(self, endpoint: Endpoint, form="pairwise", workers: int = 4, progress=True):
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}.")
        self.endpoint, self.form, self.workers = endpoint, form, workers
        self.title = f"judge {endpoint.model}" if progress else ""
        self.name = f"{endpoint.model}, {form}"
        self.counts, self.replies = Counter(), []

    @property
    def spent(self) -> str:
        return bill(self.replies)

    def _asked(self, cases: list[tuple[str, ...]]) -> dict:
        """{case: (the mark or None, the reason)}: each different case is asked once."""
        cases = list(dict.fromkeys(cases))
        questions = []
        for prompt, *answers in cases:
            turns = messages_of(prompt)
            # A talk is shown with its speakers, a single question as it is.
            talk = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            talk = turns[0]["content"] if len(turns) == 1 else talk
            shown = dict(zip(("first", "second"), map(str.strip, answers), strict=False))
            content = PROMPTS[self.form].strip().format(prompt=talk, **shown)
            questions.append([*self._examples(), {"role": "user", "content": content}])
        replies = self.endpoint.ask_all(questions, self.workers, self.title)
        found = {}
        for case, reply in zip(cases, replies, strict=True):
            mark, reason = None, reply.get("failure", "")
            if not reason:
                mark, reason = marked(reply["text"], FORMS[self.form])
            kind = "failed" if "failure" in reply else "not readable" if mark is None else "read"
            self.counts[kind] += 1
            found[case] = mark, reason
        self.replies += replies
        return found

    def _examples(self) -> list[dict]:
        """Turns that show a small model the form: one verdict for each place."""
        turns = []
        for row in PROMPTS["examples"] if self.form == "forced" else ():
            content = PROMPTS["forced"].strip().format(**row)
            turns += [{"role": "user", "content": content}]
            turns += [{"role": "assistant", "content": row["verdict"]}]
        return turns

    def prefer(self, questions: list[tuple[str, str, str]]) -> list[Vote]:
        """One vote each, in the order in which the answers are shown."""
        if self.form == "single":
            return self._by_grades(questions)
        found = self._asked(questions)
        votes = []
        for question in questions:
            mark, reason = found[question]
            votes.append(Vote(LETTERS.get(mark, 0), reason, mark is not None))
        return votes

    def _by_grades(self, questions: list[tuple[str, str, str]]) -> list[Vote]:
        alone = [(prompt, text) for prompt, *texts in questions for text in texts]
        found, votes = self._asked(alone), []
        for prompt, *texts in questions:
            (one, why), (other, why_other) = (found[prompt, text] for text in texts)
            if one is None or other is None:
                votes.append(Vote(0, why if one is None else why_other, clear=False))
                continue
            first, second = int(one), int(other)
            reason = f"{first} of 10 ({why}) against {second} ({why_other})"
            votes.append(Vote((first > second) - (first < second), reason))
        return votes

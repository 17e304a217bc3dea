"""People as a judge: what they voted, as the page `deploy.arena` keeps it."""

from collections import defaultdict

from common.judges import Vote


class People:
    """Votes that were cast: on each pair of answers the majority; as many for both is a tie.

    Args: `votes`: rows with `prompt`, `left` and `right` (texts), `vote` (1: the left one is
        better, -1: the right one, 0: a tie, or both are bad) and `voter`. A voter has one vote on a
        pair: the first. `who`: "stand-ins" where no people voted; it stands in the name.
    """

    def __init__(self, votes: list[dict], who: str = "people"):
        self.cast, seen = defaultdict(list), set()
        self.first_chosen = []  # of every vote that decides, in order: (prompt, was it the left?)
        for row in votes:
            prompt, left, right, vote = (row[key] for key in ("prompt", "left", "right", "vote"))
            case = row["voter"], prompt, frozenset((left, right))
            if case in seen:
                continue
            seen.add(case)
            self.cast[prompt, left, right].append(vote)
            self.cast[prompt, right, left].append(-vote)
            if vote:
                self.first_chosen.append((prompt, vote > 0))
        voters = len({row["voter"] for row in votes})
        self.name = f"{who} ({len(seen)} votes of {voters})"

    @property
    def questions(self) -> list[tuple[str, str, str]]:
        """Each (prompt, one, other) that somebody voted on, once, the answers in order of text."""
        return [case for case in self.cast if case[1] <= case[2]]

    def prefer(self, questions: list[tuple[str, str, str]]) -> list[Vote]:
        """The majority's vote; not clear where nobody voted."""
        votes = []
        for case in questions:
            cast = self.cast.get(case, [])
            balance = sum(cast)
            first, second = sum(vote > 0 for vote in cast), sum(vote < 0 for vote in cast)
            reason = f"{first} for the first, {second} for the second, {len(cast)} in all"
            votes.append(Vote((balance > 0) - (balance < 0), reason, bool(cast)))
        return votes

"""Measures short runs in one way, so that the points of a sweep can stand in one table."""

from dataclasses import dataclass
from functools import cached_property

from datasets import Dataset

from common.data import tokenize_prompt
from common.evaluation import Answer, Sampling, generate, kl_on_samples, logps_of
from common.evaluation import preference_metrics as rewards_of
from common.judges import Judge, compare, head_to_head
from common.lab import Lab
from common.training import Run

POINT_COLUMNS = {
    "rate": "learning rate",
    "beta": "β",
    "margin": "margin, with β",
    "accuracy": "accuracy",
    "kl": "KL, nats",
    "chosen": "Δ log p chosen",
    "rejected": "Δ log p rejected",
    "tokens": "tokens",
    "win": "win rate [95 %]",
    "steps": "steps",
}
USUAL = tuple(POINT_COLUMNS)[:-1]


@dataclass
class Yardstick:
    """Measures runs against the model that they started from (SFT, or the profile's own start).

    Args: `prompts`: answered at temperature 1, `samples` times each; the intervals are over them.
    """

    lab: Lab
    judge: Judge
    prompts: list[str]
    samples: int = 1

    @cached_property
    def start(self):
        return self.lab.load(self.lab.profile.start)

    @cached_property
    def start_logps(self):
        return self._logps(self.start)

    @cached_property
    def start_answers(self) -> list[list[Answer]]:
        return self.answers(self.start)

    def _logps(self, model):
        return logps_of(model, self.lab.test_pairs, self.lab.profile.eval_batch)

    def answers(self, model) -> list[list[Answer]]:
        """Answers to the prompts, one list a prompt, with the same random numbers every time."""
        sampling = Sampling(self.lab.profile.max_new_tokens, samples=self.samples)
        return generate(model, self.lab.tokenizer, self.prompts, sampling)

    def measure(self, run: Run) -> dict:
        """One point of a sweep.

        Returns: "rate", "beta", "steps" of the run; on held-out pairs "margin" (beta included),
            "accuracy", and "chosen", "rejected": the change of the mean log-probability of an
            answer since the start, in nats; on answers "kl" in nats per answer, "tokens" and "win",
            a WinRate against the start.
        """
        recipe, answers = run.record["hyperparameters"], self.answers(run.model)
        found = rewards_of(self._logps(run.model), self.start_logps, recipe["beta"])
        return {
            "rate": recipe["lr"],
            "beta": recipe["beta"],
            "steps": run.record["steps"],
            "margin": found["reward_margin"],
            "accuracy": found["preference_accuracy"],
            "chosen": found["rewards_chosen"] / recipe["beta"],
            "rejected": found["rewards_rejected"] / recipe["beta"],
            "kl": kl_on_samples(run.model, self.start, answers, self.lab.profile.eval_batch),
            "tokens": sum(len(a.chosen_ids) for group in answers for a in group)
            / sum(map(len, answers)),
            "win": head_to_head(self.judge, answers, self.start_answers),
        }

    def lost(self, run: Run, count: int) -> list[tuple[str, str, str]]:
        """(prompt, the start's answer, the run's answer) of the first prompts that the run lost."""
        answers = self.answers(run.model)
        verdicts = compare(self.judge, answers, self.start_answers)
        places = [place for place, verdict in enumerate(verdicts) if verdict[0] < 0]
        return [
            (self.prompts[n], self.start_answers[n][0].text, answers[n][0].text)
            for n in places[:count]
        ]


def table_of(points: dict[str, dict], columns: tuple[str, ...] = USUAL):
    """Points of a sweep, {name: what `Yardstick.measure` found}, as a table with named columns."""
    import pandas

    def text(key: str, value) -> str:
        if key == "win":
            return f"{value.rate:.2f} [{value.ci95[0]:.2f}, {value.ci95[1]:.2f}]"
        return f"{value:g}" if key in ("rate", "beta", "steps") else f"{value:.2f}"

    rows = [
        {POINT_COLUMNS[key]: text(key, point[key]) for key in columns} for point in points.values()
    ]
    return pandas.DataFrame(rows, index=list(points))


def held_back(lab: Lab, count: int = 100) -> tuple[list[str], Dataset]:
    """Prompts to choose settings by, and the training pairs that do not share one of them.

    Held-out prompts judge what was chosen, so they must not choose. A fifth of the pairs at most is
    given up. Prompts that leave no room for an answer are passed over.
    """
    pairs, room = lab.data.train, lab.profile.max_length - lab.profile.max_new_tokens
    prompts = []
    for prompt in dict.fromkeys(reversed(pairs["prompt"])):
        if len(prompts) == min(count, len(pairs) // 5):
            break
        if len(tokenize_prompt(prompt, lab.tokenizer)) <= room:
            prompts.append(prompt)
    chosen = set(prompts)
    places = [n for n, prompt in enumerate(pairs["prompt"]) if prompt not in chosen]
    return prompts, pairs.select(places)

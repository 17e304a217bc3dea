"""How `benchmarks.real` measures an arm: every measure of the plan, each thing computed once."""

import json
from time import perf_counter

from common.comparison import topical_answers
from common.evaluation import (
    Answer,
    Sampling,
    generate,
    kl_on_samples,
    logps_of,
    perplexity,
    preference_metrics,
    text_measures,
)
from common.io.files import write_json
from common.io.fingerprints import digest
from common.lab import Lab
from common.memory.meter import PeakMemory, give_back
from tools.align import MEASURES, answered, prose, prose_perplexity

SIDE_PROMPTS, SIDE_SAMPLES, SIDE_TEMPERATURE = 48, 2, 0.7
BRIEF = ("score", "constraints_met", "all_met", "ended_with_eos", "length_tokens")


def by_length(answers: list[list[Answer]]) -> list[list[Answer]]:
    """Each answer by itself, the shortest rows first: batches of them hold hardly any padding."""
    flat = [answer for group in answers for answer in group]
    return [[answer] for answer in sorted(flat, key=lambda a: len(a.prompt_ids + a.chosen_ids))]


class Ruler:
    """Measures the models of one lab against its start.

    The start is loaded for each measurement and let go after it, so that training has the memory
    to itself. Plain text is that of the first time, since the course's pages may change meanwhile.
    """

    def __init__(self, lab: Lab):
        self.lab, self.base = lab, None
        path = lab.folder / "prose.json"
        if not path.exists():
            write_json(path, prose())
        self.texts = json.loads(path.read_text(encoding="utf-8"))
        self.digest = digest(self.texts)

    def measure(self, model=None, brief: bool = False) -> tuple[dict, list[list[Answer]]]:
        """({"measures", "side", "cost"}, the answers) of a model; None: of the start.

        `brief`: only what a rate is chosen by. `cost` holds the time and the peak memory that
        measuring took, the model and the start included.
        """
        give_back()
        began, lab = perf_counter(), self.lab
        with PeakMemory() as memory:
            start = None if brief and model else lab.load("base")
            model = model or start
            answers = answered(lab, model)
            if brief:
                seen = text_measures(answers, lab.data.world)
                found = {"measures": {name: seen[name] for name in BRIEF}}
            else:
                found = {"measures": self._against(model, start, answers)}
                found["side"] = self._side(model, start)
            batch = lab.profile.eval_batch
            found["measures"]["prose_perplexity"] = prose_perplexity(
                model, lab.tokenizer, batch, self.texts
            )
        cost = {"measuring_seconds": perf_counter() - began, "measuring_peak_bytes": memory.peak}
        return found | {"cost": cost}, answers

    def _against(self, model, start, answers: list[list[Answer]]) -> dict:
        """Every shared measure, as `comparison.measure` names them."""
        lab, batch = self.lab, self.lab.profile.eval_batch
        if self.base is None:
            self.base = logps_of(start, lab.test_pairs, batch)
        policy, kl = self.base, 0.0
        if model is not start:
            policy = logps_of(model, lab.test_pairs, batch)
            kl = kl_on_samples(model, start, by_length(answers), batch)
        shared = preference_metrics(policy, self.base)
        topical = topical_answers(lab, by_length(answers), start)
        seen = text_measures(answers, lab.data.world, topical)
        return {"perplexity": perplexity(policy.chosen), "kl": kl, **shared, **seen}

    def _side(self, model, start) -> dict:
        """The same model at a lower temperature, on fewer prompts."""
        lab = self.lab
        how = Sampling(lab.profile.max_new_tokens, SIDE_TEMPERATURE, SIDE_SAMPLES, lab.seed)
        answers = generate(model, lab.tokenizer, lab.prompts[:SIDE_PROMPTS], how, progress=True)
        topical = topical_answers(lab, by_length(answers), start)
        seen = text_measures(answers, lab.data.world, topical)
        return {name: seen[name] for name in MEASURES}

"""The arms of the study, their five rates, and the comparisons that its plan named."""

from collections.abc import Callable
from dataclasses import dataclass, field

TUNING_SEEDS = (0, 1, 2)
STUDY_SEEDS = tuple(range(301, 313))
SIDE_SEEDS = STUDY_SEEDS[:8]


@dataclass(frozen=True)
class StudyArm:
    """How an arm is trained. `rate`: the middle of its five; `parent`: where not the stage's own.

    `changes`: fields of the recipe. Of the term on sums, λ is divided by the mean chosen length.
    """

    title: str
    stage: str
    rate: float
    parent: str | None = None
    changes: dict = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """Five rates, each twice the one before."""
        return [float(f"{self.rate * 2.0**step:g}") for step in (-2, -1, 0, 1, 2)]


TWICE = {"epochs": 4}
STUDY_ARMS = {
    "sft": StudyArm("SFT", "sft", 5e-3),
    "lambda0": StudyArm("imitation (λ = 0)", "orpo_lambda0", 5e-3),
    "imitate_sft": StudyArm("SFT → imitation", "orpo_lambda0", 2.5e-3, "sft"),
    "dpo_plain": StudyArm("SFT → plain DPO", "dpo_plain", 4e-5),
    "dpo": StudyArm("SFT → DPO + NLL", "dpo", 3e-4),
    "chosen_dpo": StudyArm("imitation → plain DPO", "dpo_plain", 4e-5, "orpo_lambda0"),
    "orpo": StudyArm("ORPO", "orpo", 5e-3),
    "sft_orpo": StudyArm("SFT → ORPO", "orpo", 2.5e-3, "sft"),
    "lambda0x2": StudyArm("imitation, twice the steps", "orpo_lambda0", 5e-3, None, TWICE),
    "imitate_sftx2": StudyArm(
        "SFT → imitation, twice the steps", "orpo_lambda0", 2.5e-3, "sft", TWICE
    ),
    "dpox2": StudyArm("SFT → DPO + NLL, twice the steps", "dpo", 3e-4, None, TWICE),
    "orpox2": StudyArm("ORPO, twice the steps", "orpo", 5e-3, None, TWICE),
    "orpo_logps": StudyArm("ORPO of log-probabilities", "orpo", 5e-3, None, {"contrast": "logps"}),
    "orpo_sums": StudyArm("ORPO of sums, λ/m", "orpo", 5e-3, None, {"contrast": "sums"}),
}
MAIN = tuple(STUDY_ARMS)[:8]
KNOB_PAIRS = {  # settings of `World.pairs`
    "0": {"flaw_rate": 0.0},
    ".15": {"flaw_rate": 0.15},
    ".3": {"flaw_rate": 0.3},
    ".5": {"flaw_rate": 0.5},
    "tiers": {"style": "tiers"},
}
FEW = ("sft", "lambda0", "dpo", "orpo")
STUDY_PARTS = {  # {part: {knob: arms}}: main arms on all seeds, side arms on the first eight
    "main": {".3": MAIN, "0": MAIN},
    "side": {".3": tuple(STUDY_ARMS)[8:], ".15": FEW, ".5": FEW, "tiers": FEW},
}
PART_SEEDS = {"main": STUDY_SEEDS, "side": SIDE_SEEDS}
# What is tuned before what: an arm's parent has its rate first.
TUNED = {
    "main": (
        ("sft", "lambda0", "orpo"),
        tuple(name for name in MAIN if STUDY_ARMS[name].parent) + ("dpo_plain", "dpo"),
    ),
    "side": (tuple(STUDY_ARMS)[8:],),
}


def arm_ids(part: str | None = None) -> list[str]:
    """`<arm>@<knob>` of a part, or of all, in the order in which they run."""
    parts = [STUDY_PARTS[part]] if part else STUDY_PARTS.values()
    return [f"{name}@{knob}" for one in parts for knob, names in one.items() for name in names]


def title_of(arm_id: str) -> str:
    return STUDY_ARMS[arm_id.split("@")[0]].title


def pair_of(one: str, other: str) -> str:
    """The name of a comparison: `<one>_vs_<other>`."""
    return f"{one}_vs_{other}"


# --- the comparisons. Each takes a seed's record and gives a number: positive, where it is right.


def wins(one: str, other: str, knob: str = ".3", above: float = 0.5) -> Callable[[dict], float]:
    """Win rate of one arm over another, minus `above`."""
    return lambda seed: rate_in(seed, f"{one}@{knob}", f"{other}@{knob}") - above


def rate_in(seed: dict, one: str, other: str, kind: str = "rate") -> float:
    """A win rate of a seed, in either direction. Raises: KeyError where it was not measured."""
    rates = seed["rates"]
    if (name := pair_of(one, other)) in rates:
        return rates[name][kind]
    return 1.0 - rates[pair_of(other, one)][kind]


def value_in(seed: dict, arm_id: str, name: str) -> float:
    """A measure or the rate of a flaw."""
    arm = seed["arms"][arm_id]
    return arm["flaws"][name] if name in arm["flaws"] else arm["measures"][name]


def differs(one: str, other: str, name: str, knob: str = ".3") -> Callable[[dict], float]:
    """A measure or flaw of one arm, minus that of another."""
    first, second = f"{one}@{knob}", f"{other}@{knob}"
    return lambda seed: value_in(seed, first, name) - value_in(seed, second, name)


def _both(one: str, other: str) -> dict:
    return {f"{one}@{k}_vs_{other}@{k}": wins(one, other, k) for k in (".3", "0")}


def _margin(seed: dict) -> float:
    return value_in(seed, "dpo@.3", "reward_margin") - 0.5


def _accuracy(seed: dict) -> float:
    return value_in(seed, "dpo@.3", "preference_accuracy") - 0.6


def _kl(seed: dict) -> float:
    return 10.0 - value_in(seed, "dpo@.3", "kl")


def _against_sft(seed: dict) -> float:
    return wins("orpo", "sft")(seed) - wins("dpo", "sft")(seed)


FAMILIES: dict[str, dict[str, Callable[[dict], float]]] = {
    "from_base": _both("orpo", "lambda0"),
    "from_sft": _both("dpo", "imitate_sft") | _both("sft_orpo", "imitate_sft"),
    "fair_route": _both("chosen_dpo", "lambda0") | _both("orpo", "chosen_dpo"),
    "methods": _both("orpo", "dpo") | _both("dpo_plain", "imitate_sft"),
    "sources_win_rates": {
        "dpo@.3_vs_sft@.3 above .60": wins("dpo", "sft", above=0.6),
        "dpo_plain@.3_vs_sft@.3 above .60": wins("dpo_plain", "sft", above=0.6),
        "orpo@.3_vs_sft@.3 minus dpo@.3_vs_sft@.3": _against_sft,
        "helpfulness of orpo@.3 minus dpo@.3": differs("orpo", "dpo", "helpfulness"),
    },
    "sources_measures": {
        "reward_margin of dpo@.3 above .5": _margin,
        "preference_accuracy of dpo@.3 above .60": _accuracy,
        "kl of dpo@.3 below 10": _kl,
        "helpfulness of dpo@.3 minus sft@.3": differs("dpo", "sft", "helpfulness"),
    },
    "mechanism": {
        f"{flaw} of lambda0@.3 minus orpo@.3": differs("lambda0", "orpo", flaw)
        for flaw in ("rude", "wrong_fact", "bare", "malformed")
    },
    "odds": {
        "orpo@.3_vs_orpo_logps@.3": wins("orpo", "orpo_logps"),
        "orpo@.3_vs_orpo_sums@.3": wins("orpo", "orpo_sums"),
    },
    "compute": {
        "orpo@.3_vs_lambda0x2@.3": wins("orpo", "lambda0x2"),
        "dpo@.3_vs_imitate_sftx2@.3": wins("dpo", "imitate_sftx2"),
        "orpox2@.3_vs_lambda0x2@.3": wins("orpox2", "lambda0x2"),
        "dpox2@.3_vs_imitate_sftx2@.3": wins("dpox2", "imitate_sftx2"),
    },
    "knobs": {
        f"orpo@{k}_vs_lambda0@{k}": wins("orpo", "lambda0", k) for k in (".15", ".5", "tiers")
    },
}
FAMILY_TITLES = {
    "from_base": "1 · Contrast against imitation, both from the base",
    "from_sft": "2 · Contrast against imitation, both from SFT",
    "fair_route": "3 · The fair route: imitation first, then DPO",
    "methods": "4 · The methods of the labs",
    "sources_win_rates": "5 · The sources' win rates",
    "sources_measures": "6 · The sources' measures",
    "mechanism": "7 · What contrast takes away",
    "odds": "8 · Do the odds matter? (eight seeds)",
    "compute": "9 · Equal and doubled compute (eight seeds)",
    "knobs": "10 · Other pairs (eight seeds)",
}

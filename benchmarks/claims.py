"""What the course pages claim, and what was measured of it: `python -m benchmarks.claims`.

Reads `claims.toml` and the results of the study, of the real model and of the other benchmarks.
Writes `results/claims.json`, which the notebooks show, and the tables of the pages. `--check`
writes nothing and fails where one of them says something else than the results.
"""

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

from common.io.files import write_json
from tools import claims_table, readme_table
from tools.tables import GB, RESULTS_FOLDER

CLAIM_TEXTS = Path(__file__).with_name("claims.toml")
CLAIM_RESULTS = RESULTS_FOLDER / "claims.json"
PLANS = {"toy": "study", "real": "real"}  # a world and the file of its plan's results
MADE_BY = {"toy": "make study", "real": "make real"}  # what makes them
NO_TEST = "not testable here"
ARMS_IN_WORDS = {  # an arm, without the flaw rate of its pairs
    "sft": "SFT",
    "start": "the start",
    "lambda0": "λ = 0",
    "orpo_lambda0": "λ = 0",
    "imitate_sft": "imitation from SFT",
    "chosen_dpo": "SFT on chosen, then DPO",
    "dpo": "DPO + NLL",
    "dpo_plain": "plain DPO",
    "orpo": "ORPO",
    "sft_orpo": "SFT, then ORPO",
    "lambda0x2": "λ = 0 twice as long",
    "imitate_sftx2": "imitation from SFT twice as long",
    "orpox2": "ORPO twice as long",
    "dpox2": "DPO + NLL twice as long",
    "orpo_logps": "ORPO with log-probabilities",
    "orpo_sums": "ORPO with sums",
    "orpo_clean": "ORPO on clean pairs",
    "orpo_lambda0_clean": "λ = 0 on clean pairs",
}
MEASURES_SHOWN = {  # a measure: what the tables call it, and its decimals
    "reward_margin": ("reward margin (β = 0.1)", 2),
    "preference_accuracy": ("preference accuracy", 3),
    "kl": ("KL (nats)", 2),
    "helpfulness": ("helpfulness (1–5)", 2),
    "harmlessness": ("harmlessness (1–5)", 2),
    "perplexity": ("perplexity of chosen answers", 3),
    "prose_perplexity": ("perplexity of plain text", 2),
    "constraints_met": ("constraints met", 3),
    "safe_on_harmful": ("safe on harmful", 3),
}


class ClaimError(ValueError):
    """A line of `claims.toml` that nobody can follow."""


def arm_name(arm: str) -> str:
    """`orpo@.3` → `ORPO, flaw rate .3`. Raises: ClaimError for an arm without a name."""
    stem, _, knob = arm.partition("@")
    if stem not in ARMS_IN_WORDS:
        raise ClaimError(f"There is no arm {stem!r}. Known: {', '.join(ARMS_IN_WORDS)}.")
    if not knob:
        return ARMS_IN_WORDS[stem]
    return f"{ARMS_IN_WORDS[stem]} ({'tiers' if knob == 'tiers' else f'flaw rate {knob}'})"


def number(found, digits: int = 3, sign: bool = False) -> str:
    """`0.574 [0.544, 0.604], 12 seeds`; a number alone where it has no interval."""
    form = f"{'+' if sign else ''}.{digits}f"
    if not isinstance(found, dict):
        return format(found, form)
    text = format(found["mean"], form)
    if found.get("ci95"):
        low, high = (format(end, form) for end in found["ci95"])
        text += f" [{low}, {high}]"
    return text + (f", {found['seeds']} seeds" if found.get("seeds") else "")


def _win(results: dict, text: str) -> str | None:
    first, second = text.split()
    title = f"win rate, {arm_name(first)} against {arm_name(second)}"
    rates = results.get("win_rate", {})
    if found := rates.get(f"{first}_vs_{second}"):
        return f"{title}: {number(found)}"
    if found := rates.get(f"{second}_vs_{first}"):
        ends = [1 - end for end in reversed(found["ci95"])] if found.get("ci95") else None
        return f"{title}: {number(found | {'mean': 1 - found['mean'], 'ci95': ends})}"
    return None


def _arm(results: dict, text: str) -> str | None:
    arm, measure = text.split()
    title, digits = MEASURES_SHOWN[measure]
    title = f"{title}, {arm_name(arm)}"
    own = results.get("arms", {}).get(arm, {})
    found = own.get("measures", own).get(measure)
    return None if found is None else f"{title}: {number(found, digits)}"


def _cost(results: dict, text: str) -> str | None:
    found = results.get("cost", {}).get(text)
    if found is None:
        return None
    return f"{arm_name(text)}: {found['minutes']:.1f} min, peak {found['peak_gb']:.1f} GB"


def _memory(read, text: str) -> str | None:
    method, _, lora = text.partition(" + ")
    for row in read("comparison").get("cpu", {}).get("memory", []):
        if row["method"] == method and row["lora"] == bool(lora):
            held = (row["weights_bytes"] + row["reference_bytes"]) / GB
            peak = row["peak_bytes"] / GB
            return f"`{text}`: weights and reference {held:.2f} GB, peak {peak:.2f} GB"
    return None


def _at(read, text: str) -> str | None:
    path, _, what = text.partition(" | ")
    name, *keys = path.split(" / ")
    found = read(name)
    for key in keys:
        if key not in found:
            return None
        found = found[key]
    return f"{what}: {number(found)}"


def told_in_words(comparison: str) -> str:
    """`kl of dpo@.3 below 10` → `KL (nats), DPO + NLL (flaw rate .3) below 10`."""
    measure, of, rest = comparison.partition(" of ")
    if of:
        comparison = f"{MEASURES_SHOWN.get(measure, (measure,))[0]}, {rest}"
    elif "_vs_" in comparison:
        comparison = f"win rate{' minus .5' * (' ' not in comparison)}, {comparison}"
    text = comparison.replace("_vs_", " against ")
    return re.sub(r"\w+@(tiers|\.?\d+)", lambda arm: arm_name(arm[0]), text)


def _decided(results: dict, text: str) -> tuple[str, str] | None:
    """(the verdict, its line) of a comparison of the plan, named alone or after its family."""
    family, _, comparison = text.rpartition(" | ")
    found = [
        (name, own[comparison])
        for name, own in results.get("verdicts", {}).items()
        if comparison in own and family in ("", name)
    ]
    if not found:
        return None
    if len(found) > 1:
        raise ClaimError(f"{comparison!r} stands in several families. Write FAMILY | COMPARISON.")
    finding = found[0][1]
    return finding["verdict"], f"{told_in_words(comparison)}: {number(finding, sign=True)}"


def weighed(world: str, lines: list[str], read) -> dict:
    """What is known of a claim in one world: {"verdict", "evidence": [str]}.

    `read`: name of a results file → its content, {} where there is none.
    Raises: ClaimError for a line that says nothing known.
    """
    if lines == ["none"]:
        return {"verdict": NO_TEST, "evidence": []}
    results = read(PLANS[world])
    verdict, evidence = None, []
    of_world, of_files = {"win": _win, "arm": _arm, "cost": _cost}, {"memory": _memory, "at": _at}
    for line in lines:
        verb, _, text = line.partition(": ")
        if verb == "decides":
            found = _decided(results, text)
            verdict = found[0] if found else "not measured yet"
            evidence += [found[1]] if found else []
        elif verb == "plan":
            found = _decided(results, text)
            evidence += [f"{found[1]}: {found[0]}"] if found else []
        elif verb == "live":
            evidence.append(f"one seed, when notebook {text} runs")
        elif verb in of_world:
            evidence.append(of_world[verb](results, text))
        elif verb in of_files:
            evidence.append(of_files[verb](read, text))
        else:
            raise ClaimError(
                f"{line!r}: a line begins with decides, plan, win, arm, cost, memory, …"
            )
    evidence = [line for line in evidence if line]
    verdict = verdict or ("described" if evidence else "not measured yet")
    return {"verdict": verdict, "evidence": evidence}


def read_file(name: str) -> dict:
    """A results file, or {} where it is not there."""
    path = RESULTS_FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def claims(texts: dict | None = None, read=read_file) -> dict[str, dict]:
    """{id: {"claim", "source", "met", "note", "toy", "real"}}, all that the pages show."""
    found = {}
    for name, entry in (texts or tomllib.loads(CLAIM_TEXTS.read_text(encoding="utf-8"))).items():
        try:
            worlds = {world: weighed(world, entry[world], read) for world in PLANS}
        except ClaimError as error:
            raise ClaimError(f"{name}: {error}") from None
        for world, own in worlds.items():
            if own["verdict"] == "not measured yet":
                own["verdict"] += f" ({MADE_BY[world]})"
        found[name] = {key: entry[key] for key in ("claim", "source", "met", "note")} | worlds
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 1 where `--check` finds a difference."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="recompute, compare, write nothing")
    check, found = parser.parse_args(arguments).check, claims()
    if not check:
        write_json(CLAIM_RESULTS, found)
        return readme_table.main()
    wrong = [] if CLAIM_RESULTS.exists() and read_file("claims") == found else [CLAIM_RESULTS.name]
    for page in [
        page
        for pattern in claims_table.CLAIM_PAGES
        for page in sorted(readme_table.ROOT.glob(pattern))
    ]:
        text = page.read_text(encoding="utf-8")
        wrong += [] if readme_table.filled(page, text) == text else [page.name]
    for name in wrong:
        print(f"{name} is not what the results say: python -m benchmarks.claims", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""What the study, the real model's runs and the claims page found, for the notebooks.

All is read from `benchmarks/results/`, which programs wrote. Nothing is computed here but the other
side of a win rate, so a claim has one verdict everywhere.
"""

import json
import textwrap
from pathlib import Path

import pandas

EVIDENCE = Path(__file__).parents[2] / "benchmarks" / "results"
_WIDTH = 100
_MAKE = {"study": "make study", "real": "make real", "claims": "python -m benchmarks.claims"}


def evidence(name: str) -> dict:
    """A results file, `study`, `real` or `claims`; {} where it is not there yet."""
    path = EVIDENCE / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _say(text: str, indent: str = "") -> None:
    print(textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  "))


def _missing(what: str, name: str = "study") -> None:
    _say(f"not measured yet: {what} ({_MAKE[name]})")


def as_text(found: dict | None, digits: int = 3) -> str:
    """`0.574 [0.544, 0.604]` of {"mean", "ci95"}; a dash where nothing was measured."""
    if found is None:
        return "–"
    text = f"{found['mean']:.{digits}f}"
    if not found.get("ci95"):
        return text
    return f"{text} [{found['ci95'][0]:.{digits}f}, {found['ci95'][1]:.{digits}f}]"


def show_claim(*names: str) -> None:
    """Prints claims, `"D3"` or `"O4"`: what is claimed, and what both worlds say of it.

    Raises: KeyError for a claim that is not on the page of claims.
    """
    known = evidence("claims")
    for name in names:
        entry = known[name]
        _say(f"{name}  {entry['claim'][0]}")
        for world, title in (("toy", "toy world"), ("real", "real model")):
            verdict, _, how = entry[world]["verdict"].partition(" (")
            _say(f"{title}: {verdict.upper()}{' (' * bool(how)}{how}", "    ")
            for line in entry[world]["evidence"]:
                _say(line, "      ")
        _say(entry["note"][0], "    ")


def study_rate(first: str, second: str) -> dict | None:
    """Win rate of an arm over another, `"orpo@.3"` over `"lambda0@.3"`, over the study's seeds.

    Returns: {"mean", "ci95": (low, high), "seeds"}, or None where the study has not met it.
    """
    rates = evidence("study").get("win_rate", {})
    if found := rates.get(f"{first}_vs_{second}"):
        return {**found, "ci95": tuple(found["ci95"])}
    if found := rates.get(f"{second}_vs_{first}"):
        low, high = found["ci95"]
        return {**found, "mean": 1 - found["mean"], "ci95": (1 - high, 1 - low)}
    return None


def study_table(
    arms: list[str], measures: list[str], against: str | None = None
) -> pandas.DataFrame:
    """Measures of arms of the study, mean and 95 % interval over its seeds.

    Args: `measures`: of `models` in a report, a flaw's name, or a key of the arm's cost; `against`:
        an arm, for a first column of win rates against it.
    Returns: one row an arm. Empty, with a line that says so, where the study has no such arm yet.
    """
    known = evidence("study").get("arms", {})
    rows = {}
    for arm in arms:
        if arm not in known:
            _missing(arm)
            continue
        own = known[arm]
        row = {"seeds": own["seeds"]}
        if against is not None:
            row[f"win rate against {against}"] = as_text(study_rate(arm, against))
        values = own.get("cost", {}) | own.get("flaws", {}) | own["measures"]
        for name in measures:
            found = values.get(name)
            row[name] = as_text(found if isinstance(found, dict | None) else {"mean": found})
        rows[f"{own['name']} ({arm})"] = row
    return pandas.DataFrame(rows).T


def study_verdicts(word: str = "") -> None:
    """Prints the verdicts of the study's families whose name or comparison holds a word."""
    families, shown = evidence("study").get("verdicts", {}), False
    for family, own in families.items():
        found = {name: it for name, it in own.items() if word in name or word in family}
        if found:
            shown = True
            _say(family)
        for name, finding in found.items():
            p = "p < .0001" if finding["p"] < 1e-4 else f"p = {finding['p']:.4f}"
            _say(f"{name}: {as_text(finding)}, {finding['seeds']} seeds, {p}:", "  ")
            _say(finding["verdict"].upper(), "      ")
    if not shown:
        _missing(f"verdicts {word}".strip())

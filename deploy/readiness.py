"""A readiness checklist that is run: every item shows its evidence, or fails."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One line of the list, as it came out."""

    name: str
    passed: bool
    evidence: str


def readiness(items: dict[str, Callable[[], str]]) -> list[Item]:
    """Runs every item and prints it. An item is a function that returns its evidence, or raises.

    An item that raises, or that returns no text, has failed; the others are run all the same.
    """
    found = []
    for name, item in items.items():
        try:
            evidence = item()
            passed = isinstance(evidence, str) and bool(evidence.strip())
            evidence = evidence if passed else f"no evidence: it returned {evidence!r}"
        except Exception as error:  # whatever goes wrong is what the list is for
            first_line = str(error).partition("\n")[0]
            passed, evidence = False, f"{type(error).__name__}: {first_line}"
        print(f"{'ok    ' if passed else 'FAILED'}  {name}: {evidence}")
        found.append(Item(name, passed, evidence))
    failed = [item.name for item in found if not item.passed]
    said = f"NOT READY: {'; '.join(failed)}" if failed else "Ready."
    print(f"\n{len(found) - len(failed)} of {len(found)} passed. {said}")
    return found


def require(condition: bool, otherwise: str) -> None:
    """Raises AssertionError with what was found instead."""
    if not condition:
        raise AssertionError(otherwise)

"""How the exercises are checked: a register of checks, and the door to them."""

from collections.abc import Callable, Iterator
from importlib import import_module

CHECKS: dict[str, Callable[[Callable], Iterator[tuple[str, bool]]]] = {}


def exercise(name: str):
    """Registers a check: a generator that calls the student's function and yields (property, does
    it hold?).
    """

    def register(function):
        CHECKS[name] = function
        return function

    return register


def check(name: str, fn: Callable) -> None:
    """Prints which properties of `fn` hold or broke, up to the first error it raises.

    Raises: KeyError for an unknown exercise; AssertionError, with the broken properties, unless all
        hold.
    """
    for lab in ("dpo", "orpo"):  # each registers its checks
        import_module(f"common.checks.{lab}")
    if name not in CHECKS:
        raise KeyError(f"No exercise is called {name!r}. They are: {', '.join(sorted(CHECKS))}.")
    broken = []
    properties = CHECKS[name](fn)
    while True:
        try:
            text, holds = next(properties)
        except StopIteration:
            break
        except NotImplementedError:
            text, holds = f"{fn.__name__} is not written yet", False
        except Exception as error:
            text, holds = f"{fn.__name__} raised {type(error).__name__}: {error}", False
        print(f"{'ok    ' if holds else 'BROKEN'}  {text}")
        if not holds:
            broken.append(text)
    if broken:
        raise AssertionError(f"{name}: {len(broken)} of its properties broke: {'; '.join(broken)}")

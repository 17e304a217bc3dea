"""Instant checks of the exercises: `check(name, fn)` prints which properties of `fn` hold."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules

import torch


def all_checks() -> dict[str, Callable[[Callable], Iterator[tuple[str, bool]]]]:
    """The check of each exercise, by its name.

    A check is a generator function `check_<exercise>` in a module of this package, one a notebook.
    It calls the student's function and yields pairs: a property, and whether it holds.
    """
    found = {}
    for module in iter_modules(__path__):
        for name, function in vars(import_module(f"{__name__}.{module.name}")).items():
            if name.startswith("check_"):
                found[name.removeprefix("check_")] = function
    return found


def check(name: str, fn: Callable) -> None:
    """Prints which properties of `fn` hold or broke, up to the first error that it raises.

    Raises: KeyError for an unknown exercise; AssertionError with the broken properties.
    """
    known = all_checks()
    if name not in known:
        raise KeyError(f"No exercise is called {name!r}. They are: {', '.join(sorted(known))}.")
    broken = []
    properties = known[name](fn)
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


def close(found, expected, tolerance: float = 1e-12) -> bool:
    """Whether two numbers, lists or tensors have one shape and agree to a tolerance."""
    found, expected = (torch.as_tensor(each, dtype=torch.float64) for each in (found, expected))
    return found.shape == expected.shape and torch.allclose(found, expected, tolerance, tolerance)

"""Trains one stage outside a notebook: `python -m common.training STAGE`, also under `torchrun` on
several processes.

Of several processes the first one alone says what it does; errors are printed by every process that
has one.
"""

import argparse
import ast
import dataclasses
import os
import sys
from contextlib import redirect_stdout
from typing import get_origin

from common.lab import STAGES, open_lab
from common.profiles import PROFILES, Recipe
from common.training import Session, processes, train


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, trains, and prints the final metrics. Returns the exit status."""
    fields = {
        field.name: get_origin(field.type) or field.type for field in dataclasses.fields(Recipe)
    }
    parser = argparse.ArgumentParser(prog="python -m common.training", description=__doc__)
    parser.add_argument("stage", help=f"one of: {', '.join(STAGES)}, or one of them with _lora")
    parser.add_argument(
        "--profile", choices=PROFILES, help="default: LAB_PROFILE, else by hardware"
    )
    parser.add_argument("--seed", type=int, help="default: LAB_SEED, else 0")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of the same settings",
    )
    parser.add_argument(
        "--sweep", metavar="NAME", help="keep the run in sweeps/NAME, beside the stage's own"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS", help="default: at every evaluation"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"change a hyper-parameter: {', '.join(sorted(fields))}",
    )
    options = parser.parse_args(arguments)
    changes = {}
    for setting in options.set:
        name, _, text = setting.partition("=")
        if name not in fields:
            parser.error(
                f"--set {setting}: unknown field {name!r}; choose from {', '.join(sorted(fields))}"
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        value = float(value) if fields[name] is float and type(value) is int else value
        if type(value) is not fields[name]:
            parser.error(f"--set {setting}: {name} must be of type {fields[name].__name__}")
        changes[name] = value
    process, count = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if process else sys.stdout):
        try:
            lab = open_lab(options.profile, options.seed)
            run = train(
                lab,
                options.stage,
                sweep=options.sweep,
                session=Session(options.resume, options.checkpoint_every),
                **changes,
            )
        except (OSError, RuntimeError, ValueError) as error:
            where = f" in process {process}" if count > 1 else ""
            print(f"error{where}: {processes.explained(error)}", file=sys.stderr)
            return 1
        for name, value in run.record["final"].items():
            print(f"{name:28s} {value:10.4f}")
        print(f"saved in {run.folder}")
    return 0


if __name__ == "__main__":
    if not (status := main()):
        processes.leave()
    sys.exit(status)

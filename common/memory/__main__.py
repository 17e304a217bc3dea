"""Will it fit? `python -m common.memory --profile qlora-7b --gpu-gb 16` predicts peak memory."""

import argparse
import sys

from common.memory.forecast import (
    FORECAST_METHODS,
    describe,
    fit_advice,
    fits,
    forecast_table,
    with_changes,
)
from common.memory.simulate import predict
from common.profiles import PROFILES, device_and_precision, get_profile, gpu_gigabytes

CHOICES = (  # option, its values, what it is
    ("--profile", PROFILES, "default: LAB_PROFILE, else by hardware"),
    ("--method", FORECAST_METHODS, "default: all three"),
    ("--path", ("packed", "simple"), "to the log-probabilities (default: packed)"),
    (
        "--precision",
        ("bfloat16", "float16", "float32"),
        "default: the GPU's; for --gpu-gb bfloat16",
    ),
)
NUMBERS = (
    ("--gpu-gb", float, "memory of the GPU in GB, of 1e9 bytes (default: the GPU here)"),
    ("--max-length", int, "tokens of prompt and response (default: the profile's)"),
    ("--micro-batch", int, "pairs per forward pass (default: the profile's)"),
)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if something does not fit, 2 if nothing could be predicted."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m common.memory", description=summary)
    for name, values, text in CHOICES:
        parser.add_argument(name, choices=values, help=text)
    for name, kind, text in NUMBERS:
        parser.add_argument(name, type=kind, help=text)
    options = parser.parse_args(arguments)
    changes = {"max_length": options.max_length, "micro_batch": options.micro_batch}
    changes = {name: value for name, value in changes.items() if value}
    try:
        profile = with_changes(get_profile(options.profile), **changes)
        found = device_and_precision(profile)
        gigabytes = options.gpu_gb or gpu_gigabytes()
        dtype = found[1] if found[0] == "cuda" or not gigabytes else "bfloat16"
        settings = {"dtype": options.precision or dtype, "device": "cuda" if gigabytes else "cpu"}
        methods = [options.method] if options.method else FORECAST_METHODS
        path = options.path or "packed"
        forecasts = [predict(profile, method, path, **settings) for method in methods]
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(profile, forecasts[0], settings["dtype"]))
    print(forecast_table(forecasts))
    for forecast in forecasts if gigabytes else []:
        print(fit_advice(profile, forecast, gigabytes, **settings))
    return int(bool(gigabytes) and not all(fits(forecast, gigabytes) for forecast in forecasts))


if __name__ == "__main__":
    sys.exit(main())

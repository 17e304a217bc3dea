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


def main(arguments: list[str] | None = None) -> int:
    found = device_and_precision()
    parser = argparse.ArgumentParser(
        prog="python -m common.memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--profile", choices=PROFILES, help="default: LAB_PROFILE, else by hardware"
    )
    parser.add_argument(
        "--gpu-gb", type=float, help="memory of the GPU in GB, of 1e9 bytes (default: the GPU here)"
    )
    parser.add_argument("--method", choices=FORECAST_METHODS, help="default: all three")
    parser.add_argument("--path", choices=("packed", "simple"), default="packed")
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float16", "float32"),
        help="default: that of the GPU here; for --gpu-gb bfloat16",
    )
    parser.add_argument(
        "--max-length", type=int, help="tokens of prompt and response (default: the profile's)"
    )
    parser.add_argument(
        "--micro-batch", type=int, help="pairs per forward pass (default: the profile's)"
    )
    options = parser.parse_args(arguments)
    changes = {
        name: value for name in ("max_length", "micro_batch") if (value := getattr(options, name))
    }
    try:
        profile = with_changes(get_profile(options.profile), **changes)
        gigabytes = options.gpu_gb or gpu_gigabytes()
        settings = {
            "dtype": options.precision
            or (found[1] if found[0] == "cuda" or not gigabytes else "bfloat16"),
            "device": "cuda" if gigabytes else "cpu",
        }
        forecasts = [
            predict(profile, method, options.path, **settings)
            for method in ([options.method] if options.method else FORECAST_METHODS)
        ]
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

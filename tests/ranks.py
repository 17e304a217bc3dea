"""What each process does in `test_distributed`, under torchrun: a list of runs, and perhaps an end before its time.

Arguments: JSON, a list of {"stage", "sweep", "settings", "kill" or "fail": a step before which process 1 ends}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import tiny

from common.loop import Trainer, TrainingError
from common.profiles import PROFILES
from common.train import main

PROFILES["smoke"] = tiny.micro_profile()
whole = Trainer.step


def run(stage: str, sweep: str, settings: dict, kill: int = 0, fail: int = 0, extra: tuple = ()) -> int:
    """Trains a stage with the command line's own `main`."""

    def step(self):
        if os.environ["RANK"] == "1" and self.state["step"] + 1 in (kill, fail):
            Path(self.folder, "ended").write_text(str(time.time()))
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise TrainingError("this process alone has met something")
        return whole(self)

    Trainer.step = step
    changes = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    return main([stage, "--sweep", sweep, *changes, *extra])


sys.exit(max(run(**each) for each in json.loads(sys.argv[1])))

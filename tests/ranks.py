"""What each process does in `test_distributed`: the runs of a list, with the command line's own
`main`.

Argument: JSON, a list of {"stage", "sweep", "settings", "options", "end"}; the last two may be
missing. "end" is [step, how, processes]: before this step these processes get a SIGKILL ("kill") or
raise an error ("fail"). Ends with the status of the last run.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import tiny
from accelerate import PartialState
from accelerate.utils import DistributedType

from common.profiles import PROFILES
from common.training.__main__ import main
from common.training.trainer import Trainer, TrainingError

PROFILES["smoke"] = tiny.micro_profile()
if (
    os.environ.get("ACCELERATE_USE_FSDP") == "true"
):  # Accelerate shards over GPUs only: it is told that these are some
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
whole_step = Trainer.step


def run(
    stage: str, sweep: str, settings: dict, options: tuple = (), end: tuple = (0, "", ())
) -> int:
    last, how, processes = end

    def step(self, *batch):
        if self.progress.step + 1 == last and int(os.environ["RANK"]) in processes:
            Path(self.task.folder, "ended").write_text(str(time.time()))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise TrainingError("the test ends this process here")
        return whole_step(self, *batch)

    Trainer.step = step
    changes = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    return main([stage, "--sweep", sweep, *changes, *options])


status = [run(**each) for each in json.loads(sys.argv[1])]
sys.exit(status[-1])

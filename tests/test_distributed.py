"""Two processes under the real launchers: the numbers of one, exact resume, and an end without a
hang when one fails.

A launch costs over ten seconds of imports, so there are three, each with several runs (`ranks.py`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from tiny import assert_same

from common.io.files import read_metrics
from common.training import Source, checkpoints, processes
from common.training import train as train_stage
from common.training.processes import LaunchError, shares

TESTS = Path(__file__).parent
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP = ["accelerate.commands.launch", "--config_file", "configs/fsdp.yaml", "--num_processes", "2"]
# 40 pairs, 5 batches of 7 an epoch: 20 steps. The shares are 4 and 3 pairs, in micro-batches of 2 +
# 2 and 2 + 1.
RAGGED = {"batch_size": 7, "micro_batch": 2, "epochs": 4.0, "evaluations": 1, "clip": 0.6}
EVEN = RAGGED | {"batch_size": 8, "evaluations": 4, "keep_best": True}  # FSDP computes in lockstep
CACHED = RAGGED | {"epochs": 1.0, "cache_reference": True}
CACHED_EVEN = CACHED | {"batch_size": 8}
EVERY_3 = ["--checkpoint-every", "3"]


@pytest.fixture(scope="module")
def lab(trained_lab):
    return trained_lab


def launch(launcher: list[str], *runs: dict) -> SimpleNamespace:
    """These runs on two processes: status, what was printed, and when it was over. A hang would
    fail here.
    """
    command = [sys.executable, "-m", *launcher, str(TESTS / "ranks.py"), json.dumps(runs)]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=150,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": paths},
    )
    return SimpleNamespace(
        status=done.returncode, out=done.stdout, err=done.stderr, over=time.time()
    )


@pytest.fixture(scope="module")
def killed(lab):
    """DPO, ORPO and DPO with a cached reference; then a run whose process 1 gets a SIGKILL before
    step 8.
    """
    return launch(
        TORCHRUN,
        {"stage": "dpo", "sweep": "dpo-two", "settings": RAGGED},
        {"stage": "orpo", "sweep": "orpo-two", "settings": RAGGED},
        {"stage": "dpo", "sweep": "cached-two", "settings": CACHED},
        {
            "stage": "dpo",
            "sweep": "killed",
            "settings": RAGGED,
            "options": EVERY_3,
            "end": [8, "kill", [1]],
        },
    )


@pytest.fixture(scope="module")
def failed(lab, killed):
    """The killed run resumed, a copy kept for one process; then a run whose process 1 raises an
    error before step 4.
    """
    shutil.copytree(lab.path("dpo", "killed"), lab.path("dpo", "killed-copy"))
    return launch(
        TORCHRUN,
        {"stage": "dpo", "sweep": "killed", "settings": RAGGED, "options": ["--resume"]},
        {"stage": "dpo", "sweep": "failed", "settings": RAGGED, "end": [4, "fail", [1]]},
    )


@pytest.fixture(scope="module")
def sharded(lab):
    """Under FSDP: DPO with a cached reference, stopped before its last step; DPO, stopped before
    step 8 and resumed.
    """
    return launch(
        FSDP,
        {
            "stage": "dpo",
            "sweep": "fsdp-cached",
            "settings": CACHED_EVEN | {"path": "simple"},
            "options": EVERY_3,
            "end": [5, "fail", [0, 1]],
        },
        {
            "stage": "dpo",
            "sweep": "fsdp",
            "settings": EVEN,
            "options": EVERY_3,
            "end": [8, "fail", [0, 1]],
        },
        {"stage": "dpo", "sweep": "fsdp", "settings": EVEN, "options": ["--resume"]},
    )


def assert_same_run(metrics: list[dict], single: list[dict], without: tuple = ()) -> None:
    """The loss of every step within 1e-5; every other figure within 1e-5 of its size, where that is
    above 1.

    With a cached reference, `without` accuracy: at step 1 all margins are 0 but for rounding, which
    decides each.
    """
    assert [row["step"] for row in metrics] == [row["step"] for row in single]
    for one, other in zip(single, metrics, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - set(without):
            value = one[name]
            scale = 1.0 if name.endswith("loss") else max(1.0, abs(value))
            assert abs(value - other[name]) <= 1e-5 * scale, (one["step"], name)


# --- two processes are as one


@pytest.mark.parametrize("stage", ["dpo", "orpo"])
def test_two_processes_train_as_one_does(lab, killed, stage):
    """Over 20 steps on ragged pairs, 7 a step, with accumulation. Gradients of a wrong scale would
    be clipped at other steps.
    """
    single = train_stage(lab, stage, sweep=f"{stage}-one", **RAGGED)
    metrics, record = (
        read_metrics(lab.path(stage, f"{stage}-two")),
        lab.record(stage, f"{stage}-two"),
    )
    assert (record["processes"], single.record["processes"], len(metrics)) == (2, 1, 21)
    assert record["train_tokens"] == single.record["train_tokens"]
    assert_same_run(metrics, single.metrics)


def test_a_reference_that_two_processes_computed_is_that_of_one(lab, killed):
    """Each takes every other pair; the columns are put together in the rows' order."""
    files = {
        file: json.loads(file.read_text(encoding="utf-8"))
        for file in (lab.folder / "reference").glob("*.json")
    }
    [(file, two)] = [
        (file, found) for file, found in files.items() if found["key"]["path"] == "packed"
    ]
    file.unlink()
    single = train_stage(lab, "dpo", sweep="cached-one", **CACHED)
    one = json.loads(file.read_text(encoding="utf-8"))
    for name in ("reference_chosen_logps", "reference_rejected_logps"):
        assert len(one[name]) == 40
        assert_same(two[name], one[name], 1e-6)
    assert_same_run(
        read_metrics(lab.path("dpo", "cached-two")), single.metrics, without=("accuracy",)
    )


def test_the_first_process_alone_says_how_a_step_is_divided(killed):
    """Two processes × 2 pairs × 2 micro-batches are 8, one more than the 7 of a step."""
    said = killed.out
    line = "dpo: 2 processes × at most 2 pairs per micro-batch × 2, 7 pairs a step in all"
    assert (said.count(line), said.count("dpo: packed path")) == (3, 3)  # once for each DPO run
    assert (said.count("seed      0"), said.count("saved in ")) == (4, 3)


# --- one ends before its time


def test_a_killed_process_ends_the_job_with_an_error(lab, killed):
    """The launcher names the process and the signal, and does not wait for the other one. (Which of
    the two it calls the root cause is chance: the other one may end by itself, for the lost
    connection, before the launcher looks.)
    """
    assert killed.status != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL", killed.err), killed.err[-3000:]
    assert killed.over - float((lab.path("dpo", "killed") / "ended").read_text()) < 30


def test_a_killed_run_is_resumed_by_two_processes(lab, failed):
    """From the checkpoint of step 6, to the figures of a run that nothing stopped."""
    assert "dpo: resumed at step 6 of 20" in failed.out
    assert_same_run(
        read_metrics(lab.path("dpo", "killed")), read_metrics(lab.path("dpo", "dpo-two"))
    )


def test_a_run_of_two_processes_is_resumed_by_one(lab, failed, capsys):
    """The batch is of all processes together, so their number may change."""
    single = train_stage(lab, "dpo", sweep="killed-copy", **RAGGED)
    assert "dpo: resumed at step 6 of 20" in capsys.readouterr().out
    assert_same_run(single.metrics, read_metrics(lab.path("dpo", "dpo-two")))


def test_an_error_of_one_process_ends_the_job(lab, failed):
    """Its message is there, and the other one, which waited for its gradients, ends too."""
    assert failed.status != 0
    assert "error in process 1: the test ends this process here" in failed.err
    assert failed.over - float((lab.path("dpo", "failed") / "ended").read_text()) < 30


# --- FSDP, which takes a launch of its own


@pytest.mark.more
def test_a_run_in_shards_is_as_one_in_a_piece(lab, sharded):
    """Stopped and resumed on the way; the best weights put back at the end; saved whole."""
    assert sharded.status == 0, sharded.err[-3000:]
    assert "dpo: resumed at step 6 of 20" in sharded.out
    single = train_stage(lab, "dpo", sweep="whole", **EVEN)
    assert_same_run(read_metrics(lab.path("dpo", "fsdp")), single.metrics)
    for one, other in zip(
        single.model.parameters(), lab.load("dpo", "fsdp").parameters(), strict=True
    ):
        assert_same(other.detach(), one.detach(), 1e-5)


@pytest.mark.more
def test_a_checkpoint_of_a_run_in_shards_is_in_shards(lab, sharded):
    """One file of weights and one of optimiser states per process."""
    saved = checkpoints.newest(lab.path("dpo", "fsdp-cached"))
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert len(list((saved / part).glob("*.distcp"))) == 2


@pytest.mark.more
def test_a_reference_in_shards_is_as_one_in_a_piece(lab, sharded):
    """Its log-probabilities are taken by the simple path there and by the packed one here; 4 steps,
    then it stops.
    """
    single = train_stage(lab, "dpo", sweep="cached-even", **CACHED_EVEN)
    assert_same_run(
        read_metrics(lab.path("dpo", "fsdp-cached")), single.metrics[:5], without=("accuracy",)
    )


# --- what is refused


def test_a_step_is_divided_in_words():
    """16 pairs are 2 × 8 × 1, or 2 × 2 × 4; 10 among 4 are at most 3 each."""
    assert (
        shares(2, 16, 16, "pairs") == "2 processes × 8 pairs per micro-batch × 1 = 16 pairs a step"
    )
    assert (
        shares(2, 16, 2, "pairs") == "2 processes × 2 pairs per micro-batch × 4 = 16 pairs a step"
    )
    assert shares(1, 16, 4, "texts") == "1 process × 4 texts per micro-batch × 4 = 16 texts a step"
    assert (
        shares(4, 10, 8, "pairs")
        == "4 processes × at most 3 pairs per micro-batch × 1, 10 pairs a step in all"
    )


def test_a_batch_smaller_than_the_number_of_processes_is_refused():
    with pytest.raises(
        LaunchError, match="3 pairs a step cannot be divided among 4 processes.*batch_size=4"
    ):
        shares(4, 3, 2, "pairs")


def test_fsdp_needs_equal_shares():
    with pytest.raises(LaunchError, match="7 pairs a step must be a multiple of the 2 processes"):
        shares(2, 7, 2, "pairs", sharded=True)


def test_a_world_that_accelerate_does_not_see_is_refused(monkeypatch):
    """As of a launcher that sets WORLD_SIZE alone: each process would train a model of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        LaunchError, match="WORLD_SIZE is 2, but Accelerate sees 1 process:.*torchrun"
    ):
        processes.check_launch(
            SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO)
        )


def test_sharding_that_accelerate_does_not_do_is_refused(monkeypatch):
    """On processes without GPUs it would train every weight everywhere, and say nothing."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LaunchError, match="FSDP was asked for"):
        processes.check_launch(
            SimpleNamespace(num_processes=1, distributed_type=DistributedType.MULTI_CPU)
        )


@pytest.mark.parametrize(
    ("stage", "kind", "rows", "said"),
    [
        ("dpo_lora", "FSDP", 40, "LoRA fits one GPU"),
        ("dpo", "FSDP", 7, "7 pairs a step must be a multiple of the 4"),
        ("dpo", "MULTI_GPU", 3, "3 pairs a step cannot be divided among 4 processes"),
    ],
)
def test_a_trainer_is_refused_what_its_processes_cannot_do(
    lab, monkeypatch, stage, kind, rows, said
):
    """Four processes and a batch size of 8. Where there are fewer rows than that, they are the
    batch.
    """
    world = SimpleNamespace(
        num_processes=4, distributed_type=DistributedType[kind], is_main_process=True
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(processes, "Accelerator", lambda **options: world)
    pairs = lab.data.train.select(range(rows))
    with pytest.raises(LaunchError, match=said):
        train_stage(lab, stage, sweep="refused", source=Source(pairs=pairs))


def test_a_lost_connection_says_what_to_do():
    """Gloo's own words name a line of C++."""
    lost = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    )
    assert processes.explained(lost).startswith("the connection to another process broke")
    assert processes.explained(RuntimeError("out of memory")) == "out of memory"


def test_a_process_with_other_data_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "of_main", lambda value: "another")
    with pytest.raises(
        LaunchError, match="other settings, data, code or package versions than process 0"
    ):
        processes.check_same("mine")

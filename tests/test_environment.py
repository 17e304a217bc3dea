"""The environment check: what it calls ready, what it wants fixed, and that it says how."""

from collections import namedtuple
from importlib import metadata

import pytest

from common import environment, profiles

CPU = profiles.PROFILES["cpu"]


def statuses(lines):
    return [status for status, _ in lines]


@pytest.fixture
def versions(monkeypatch):
    """Stands in for what is installed: package name → version."""
    found = {"common": "0.1.0"}

    def version(name):
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(environment.metadata, "version", version)
    return found


def test_python_3_10_is_too_old_and_3_11_is_not():
    assert environment.python_line((3, 10, 14))[0] == "FIX"
    assert environment.python_line((3, 11, 0)) == ("OK", "Python 3.11.0")


def test_pins_are_read_and_comments_are_not(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# torch==1.0 was here\ntorch==2.13.0\n\nhuggingface-hub==2.4.0\n")
    assert environment.read_pins(path) == {"torch": "2.13.0", "huggingface-hub": "2.4.0"}


def test_pins_come_from_the_installed_package_when_the_file_is_not_there(tmp_path, monkeypatch):
    """The extra `dev` is for developers: the labs run without it."""
    needs = ["torch==2.13.0", 'ruff==0.17.5; extra == "dev"']
    monkeypatch.setattr(environment.metadata, "requires", lambda name: needs)
    assert environment.read_pins(tmp_path / "absent.txt") == {"torch": "2.13.0"}


def test_every_line_of_requirements_is_an_exact_pin():
    lines = environment.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    assert len(environment.read_pins()) == sum(
        bool(line) and not line.startswith("#") for line in lines
    )


def test_a_build_label_does_not_change_the_version(versions):
    versions["torch"] = "2.13.0+cpu"
    assert environment.package_lines({"torch": "2.13.0"}) == [("OK", "torch 2.13.0")]


def test_another_version_is_named_with_the_command_that_installs_the_pinned_one(versions):
    versions["trl"] = "1.15.0"
    [(status, text)] = environment.package_lines({"trl": "1.16.0"})
    assert status == "FIX"
    assert "1.15.0" in text and text.endswith(': python -m pip install "trl==1.16.0"')


def test_a_missing_package_is_named(versions):
    [(status, text)] = environment.package_lines({"peft": "0.21.2"})
    assert status == "FIX" and text.startswith("peft is not installed")


def test_a_package_that_moved_underneath_is_a_note(versions):
    """What others bring along may differ, and it is said; a missing one may be another system's."""
    versions |= {"numpy": "2.5.0", "anyio": "4.16.0"}
    tested = {"numpy": "2.4.6", "anyio": "4.16.0", "pywinpty": "3.0.0"}
    [(status, text)] = environment.moved_lines(tested)
    assert status == "NOTE" and "tested: numpy 2.5.0;" in text
    assert text.endswith("python -m pip install -c constraints.txt -r requirements.txt")
    versions["numpy"] = "2.4.6"
    assert environment.moved_lines(tested) == []


def test_the_course_package_must_be_installed(versions):
    del versions["common"]
    [(status, text)] = environment.package_lines({})[1:]
    assert status == "FIX" and text.endswith("python -m pip install -e .")


def test_no_pins_at_all_is_not_ready(versions):
    assert statuses(environment.package_lines({})) == ["FIX"]


@pytest.mark.parametrize(
    ("gpus", "cuda", "usable", "cuda_bytes", "status", "words"),
    [
        ([], None, False, 0, "OK", "built for CPU"),
        (["T4, 15360 MiB"], "13.0", True, 4e9, "OK", "built for CUDA 13.0"),
        # in a container without nvidia-smi
        ([], "13.0", True, 4e9, "OK", "a GPU that torch can use"),
        (["T4, 15360 MiB"], None, False, 0, "FIX", "install the CUDA build"),
        (["T4, 15360 MiB"], "13.0", False, 4e9, "FIX", "update the NVIDIA driver"),
        ([], "13.0", False, 4.2e9, "FIX", "4.2 GB of CUDA packages"),
        # left over from a CUDA build
        ([], None, False, 4.2e9, "FIX", "install first the CPU build"),
    ],
)
def test_torch_must_fit_the_machine(gpus, cuda, usable, cuda_bytes, status, words):
    found, text = environment.torch_line(gpus, cuda, usable, cuda_bytes)
    assert found == status and words in text


def test_a_failing_nvidia_smi_means_that_the_proc_folder_decides(monkeypatch, tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    answer = namedtuple("Answer", "returncode stdout")(9, "NVIDIA-SMI has failed")
    monkeypatch.setattr(environment.shutil, "which", lambda name: name)
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(environment, "Path", lambda _: tmp_path)
    assert environment.nvidia_gpus() == ["NVIDIA GPU at 0000:01:00.0"]


def test_nvidia_smi_names_every_gpu(monkeypatch):
    answer = namedtuple("Answer", "returncode stdout")(
        0, "Tesla T4, 15360 MiB\nTesla T4, 15360 MiB\n"
    )
    monkeypatch.setattr(environment.shutil, "which", lambda name: name)
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: answer)
    assert environment.nvidia_gpus() == ["Tesla T4, 15360 MiB"] * 2


def test_only_cuda_packages_are_counted(monkeypatch):
    package, file = namedtuple("Package", "name files"), namedtuple("File", "size")
    packages = [
        package("nvidia-cublas", [file(700), file(None)]),
        package("triton", [file(30)]),
        package("torch", [file(9000)]),
        package("nvidia-nccl-cu13", None),
    ]
    monkeypatch.setattr(environment.metadata, "distributions", lambda: packages)
    assert environment.cuda_package_bytes() == 730


@pytest.mark.parametrize(
    ("name", "device", "status"),
    [
        ("qlora-7b", "cpu", "FIX"),
        ("qlora-7b", "cuda", "OK"),
        ("qwen-0.5b", "cpu", "NOTE"),
        ("gpt2", "cpu", "NOTE"),
        ("cpu", "cpu", "OK"),
    ],
)
def test_what_a_profile_is_worth_without_a_gpu(name, device, status):
    """4-bit cannot work on a CPU, GPT-2 works slowly, the small experiment needs no GPU."""
    found = statuses(
        environment.profile_lines(profiles.PROFILES[name], device, "float32", "because")
    )
    assert found.count(status) == (len(found) if status == "OK" else 1)


def test_the_profile_and_the_reason_for_it_are_told():
    lines = environment.profile_lines(profiles.get_profile("cpu"), "cpu", "float32", "no CUDA GPU")
    assert any("profile cpu (asked for)" in text for _, text in lines)


def test_little_disk_and_little_memory_are_each_named():
    assert statuses(environment.room_lines(CPU, memory_bytes=8e9, free_bytes=9e9)) == ["OK", "OK"]
    assert statuses(environment.room_lines(CPU, memory_bytes=1e9, free_bytes=9e9)) == ["FIX", "OK"]
    [_, (status, text)] = environment.room_lines(CPU, memory_bytes=8e9, free_bytes=0.5e9)
    assert status == "FIX" and "0.5 GB of free disk" in text


def test_every_profile_says_how_much_room_it_needs():
    assert environment.ROOM.keys() == profiles.PROFILES.keys()


def test_an_unknown_profile_is_a_line_to_fix_and_not_a_crash(monkeypatch):
    monkeypatch.setenv("LAB_PROFILE", "gtp2")
    status, text = environment.all_lines()[-1]
    assert status == "FIX" and "'gtp2'" in text


def test_disk_is_checked_before_the_run_folder_exists(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path / "not" / "yet"))
    assert any("free disk" in text for _, text in environment.all_lines())


@pytest.mark.parametrize(("second", "status"), [("OK", 0), ("NOTE", 0), ("FIX", 1)])
def test_the_exit_status_is_one_exactly_when_something_needs_fixing(
    monkeypatch, capsys, second, status
):
    monkeypatch.setattr(environment, "all_lines", lambda: [("OK", "a"), (second, "b: c")])
    assert environment.main() == status
    assert capsys.readouterr().out.splitlines()[:2] == ["OK    a", f"{second:4}  b: c"]

"""The runner of the notebooks, on notebooks of one to three cells, and the tables made from what
was measured.
"""

import json
import os
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from common.profiles import PROFILES, TINY
from tools import bench_table, readme_table, results_table, run_labs

LAB = "Lab-1.7-DPO_Alignment"


def write_notebook(folder, name, *sources):
    path = folder / LAB / name
    path.parent.mkdir(exist_ok=True)
    cells = [new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_a_notebook_runs_in_its_own_folder_and_is_measured(tmp_path):
    """100 MB that are released at once still count in the peak."""
    notebook = write_notebook(
        tmp_path, "01-A.ipynb", "import os; print(os.getcwd())", "len(b'1' * 100_000_000)"
    )
    before = notebook.read_bytes()
    [(name, timing)] = run_labs.run_all([notebook], tmp_path / "copies").items()
    copy = nbformat.read(tmp_path / "copies" / name, 4)
    assert name == f"{LAB}/01-A.ipynb"
    assert os.path.samefile(copy.cells[0].outputs[0].text.strip(), notebook.parent)
    assert timing["wall_seconds"] > 0 and timing["peak_memory_bytes"] > 100_000_000
    assert notebook.read_bytes() == before


def test_in_place_writes_outputs_and_changes_nothing_else(tmp_path):
    notebook = write_notebook(tmp_path, "01-A.ipynb", "6 * 7")
    before = nbformat.read(notebook, 4)
    run_labs.run_all([notebook], tmp_path / "copies", in_place=True)
    after = nbformat.read(notebook, 4)
    assert after.cells[0].outputs[0].data["text/plain"] == "42"
    after.cells[0].update(outputs=[], execution_count=None)
    assert after == before


def test_in_place_refuses_a_path_of_this_machine(tmp_path):
    """The source is free of it; the output is not."""
    notebook = write_notebook(tmp_path, "01-A.ipynb", "import common; print(common.__path__[0])")
    before = notebook.read_bytes()
    with pytest.raises(run_labs.LabFailed, match="path of this machine"):
        run_labs.run_all([notebook], tmp_path / "copies", in_place=True)
    assert notebook.read_bytes() == before


def test_the_first_failure_ends_the_run_and_says_where(tmp_path):
    """What ran before the error is in the copy, what comes after it never runs."""
    first = write_notebook(tmp_path, "01-A.ipynb", "print('here')", "1 / 0", "print('never')")
    second = write_notebook(tmp_path, "02-B.ipynb", "print('never')")
    with pytest.raises(run_labs.LabFailed) as failure:
        run_labs.run_all([first, second], tmp_path / "copies")
    text = str(failure.value)
    assert (
        "Lab-1.7 01-A failed in cell 2/3" in text
        and "1 / 0" in text
        and "ZeroDivisionError" in text
    )
    copy = nbformat.read(tmp_path / "copies" / LAB / "01-A.ipynb", 4)
    assert copy.cells[0].outputs[0].text == "here\n" and copy.cells[2].execution_count is None
    assert not (tmp_path / "copies" / LAB / "02-B.ipynb").exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL.*when memory runs out"),
        ("import ctypes; ctypes.string_at(0)", r"killed by SIGSEGV\.\n"),
        ("import os; os._exit(9)", "exit status 9"),
    ],
    ids=["out of memory", "crash", "exit"],
)
def test_a_kernel_that_dies_is_reported_with_the_cell_and_what_ended_it(tmp_path, source, reason):
    notebook = write_notebook(tmp_path, "01-A.ipynb", "1", source)
    with pytest.raises(run_labs.LabFailed) as failure:
        run_labs.run_all([notebook], tmp_path / "copies")
    assert re.search(f"cell 2/2(?s:.)*{re.escape(source)}(?s:.)*{reason}", str(failure.value))


def test_a_run_that_is_stopped_says_so_and_keeps_what_ran(tmp_path):
    """The kernel itself sends Ctrl-C to this process, then never ends: the run must end it."""
    stop = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    notebook = write_notebook(tmp_path, "01-A.ipynb", "print('here')", stop)
    with pytest.raises(run_labs.LabFailed, match=r"(?s)cell 2/2.*was stopped from outside"):
        run_labs.run_all([notebook], tmp_path / "copies")
    copy = nbformat.read(tmp_path / "copies" / LAB / "01-A.ipynb", 4)
    assert copy.cells[0].outputs[0].text == "here\n"


def model(**values):
    return dict.fromkeys(results_table.MEASURES, 0.25) | values


def write_results(path, **models):
    rates = {"dpo_vs_sft": {"wins": 5, "ties": 2, "losses": 3, "rate": 0.6, "ci95": [0.4, 0.8]}}
    path.write_text(json.dumps({"models": models, "win_rate": rates}))


def test_the_results_show_what_was_measured_and_a_dash_for_what_was_not(tmp_path):
    sft = model(kl=None, std={"perplexity": 0.1})
    write_results(tmp_path / "evaluation.json", sft=sft, dpo=model(perplexity=7.5), base=model())
    lines = results_table.results_table(tmp_path).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert lines[2].split() == ["SFT", "DPO"]
    assert rows["perplexity"] == ["0.25", "±", "0.10", "7.50"]
    assert rows["kl"] == ["–", "0.25"]
    assert " ".join(rows["dpo_vs_sft"]) == "60.0% [40.0%, 80.0%] 5 wins, 2 ties, 3 losses"


@pytest.mark.parametrize(("age", "columns"), [(-1, ["SFT", "DPO"]), (1, ["SFT", "DPO", "ORPO"])])
def test_a_comparison_older_than_the_evaluation_is_left_out(tmp_path, age, columns):
    write_results(tmp_path / "evaluation.json", sft=model(), dpo=model())
    write_results(tmp_path / "comparison.json", orpo=model())
    now = (tmp_path / "evaluation.json").stat().st_mtime
    os.utime(tmp_path / "comparison.json", (now + age, now + age))
    assert results_table.results_table(tmp_path).splitlines()[2].split() == columns


@pytest.mark.parametrize("beats_a_coin", [True, False])
def test_the_results_name_the_judge_and_warn_of_a_coin(tmp_path, beats_a_coin):
    """A win rate of a judge that guesses must not be read as one of quality."""
    write_results(tmp_path / "evaluation.json", sft=model())
    report = json.loads((tmp_path / "evaluation.json").read_text())
    report |= {"judge": "somebody", "judge_beats_a_coin": beats_a_coin}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    text = results_table.results_table(tmp_path)
    assert "Judge: somebody." in text and ("no better than a coin" in text) != beats_a_coin


def test_without_results_the_table_says_which_notebook_writes_them(tmp_path):
    assert "notebook 04 of Lab 1.7" in results_table.results_table(tmp_path)


def test_the_readme_table_has_a_row_per_notebook_and_says_what_was_not_measured():
    """80.4 s is 1 min 20 s; 620 MB is 0.62 GB; the total adds times and takes the largest memory."""
    machine = {"cpu": "X", "cores": 2, "memory_bytes": 8e9, "gpu": [], "versions": {"torch": "2"}}
    both = {
        f"{LAB}/01-A.ipynb": {"wall_seconds": 80.4, "peak_memory_bytes": 620e6},
        f"{LAB}/02-B.ipynb": {"wall_seconds": 5, "peak_memory_bytes": 100e6},
    }
    one = {f"{LAB}/01-A.ipynb": {"wall_seconds": 3, "peak_memory_bytes": 50e6}}
    results = {
        "cpu": {"machine": machine, "notebooks": both},
        "smoke": {"machine": machine, "notebooks": one},
    }
    lines = readme_table.table(results, "notebook", "all", "not measured").splitlines()
    assert lines[0] == "| notebook | `cpu` | `smoke` |"
    assert (
        lines[2] == f"| [Lab-1.7 01-A]({LAB}/01-A.ipynb) | 1 min 20 s · 0.62 GB | 3 s · 0.05 GB |"
    )
    assert lines[3] == f"| [Lab-1.7 02-B]({LAB}/02-B.ipynb) | 5 s · 0.10 GB | not measured |"
    assert lines[4] == "| all | 1 min 25 s · 0.62 GB | 3 s · 0.05 GB |"


def test_only_the_text_between_the_comments_changes_and_it_must_be_there():
    old = "a\n<!-- notebook times -->\nold\n<!-- /notebook times -->\nb\n"
    assert readme_table.updated(old, "notebook times", "new\n") == old.replace("old", "new")
    with pytest.raises(ValueError, match="found 0"):
        readme_table.updated("no comments", "notebook times", "new\n")


@pytest.mark.parametrize("name", readme_table.WORDS)
def test_the_figures_in_the_readmes_are_the_recorded_ones(name):
    """Nobody types them: `python tools/readme_table.py` brings a README up to date."""
    text = (readme_table.ROOT / name).read_text(encoding="utf-8")
    results = (readme_table.RESULTS, readme_table.QUALITY)
    times, scores = (json.loads(path.read_text(encoding="utf-8")) for path in results)
    assert (
        readme_table.updated(
            text, "notebook times", readme_table.table(times, *readme_table.WORDS[name])
        )
        == text
    )
    assert readme_table.updated(text, "quality", readme_table.quality_markdown(scores)) == text
    assert readme_table.updated(text, "recipes", readme_table.recipes_table(name)) == text
    language = readme_table.LANGUAGES[name]
    assert (
        readme_table.updated(
            text, "step", bench_table.step_summary(bench_table.read("step"), language)
        )
        == text
    )
    assert (
        readme_table.updated(
            text, "gpu", bench_table.gpu_markdown(bench_table.read("gpu"), language)
        )
        == text
    )
    text = (readme_table.ROOT / readme_table.ORPO_LAB / name).read_text(encoding="utf-8")
    comparison = json.loads(readme_table.COMPARISON.read_text(encoding="utf-8"))
    assert (
        readme_table.updated(text, "comparison", readme_table.comparison_markdown(comparison))
        == text
    )


@pytest.mark.parametrize(("language", "missing"), [("en", "not measured"), ("zh", "未測量")])
def test_without_a_gpu_every_full_size_profile_is_not_measured(language, missing):
    """Three methods each, and four cells a row; the tiny profiles are not there."""
    lines = bench_table.gpu_markdown(None, language).splitlines()[2:]
    profiles = [name for name, profile in PROFILES.items() if profile.model != TINY]
    assert [line.split(" | ")[0] for line in lines] == [
        f"| `{name}`" for name in profiles for _ in range(3)
    ]
    assert all(line.count(missing) == 4 for line in lines)


def test_results_are_read_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_table, "RESULTS", tmp_path)
    (tmp_path / "step.json").write_text('{"bars": []}')
    assert bench_table.read("step") == {"bars": []} and bench_table.read("gpu") is None


def test_the_measured_line_names_the_profiles_that_were_not_measured():
    """80.4 s is 1 min 20 s; of the five profiles only `cpu` has a time here."""
    results = {
        "cpu": {
            "notebooks": {f"{LAB}/01-A.ipynb": {"wall_seconds": 80.4, "peak_memory_bytes": 620e6}}
        }
    }
    line = readme_table.measured_line(results, f"{LAB}/01-A.ipynb")
    assert line.endswith(
        "`cpu` 1 min 20 s · 0.62 GB. Not measured: `smoke`, `gpt2`, `qwen-0.5b`, `qlora-7b`."
    )


def test_the_recipes_are_the_profiles_own():
    """A stage has a row; plain DPO only where its rate differs. 0.0004 is written 4e-4."""
    english, chinese = (
        readme_table.recipes_table(name).splitlines() for name in readme_table.WORDS
    )
    assert (
        "| `smoke` | `dpo` | 4e-4 | 0.1 |  | 3 | rate: ours, tuned on seeds 0–2; β: "
        in "\n".join(english)
    )
    assert (
        "| `cpu` | `orpo` | 5e-3 |  | 0.5 | 2 | rate: ours, tuned on seeds 0–2; λ: the lab page |"
        in english
    )
    stages = [line.split("`")[3] for line in english[2:] if line.startswith("| `qlora-7b`")]
    assert stages == ["sft", "dpo", "orpo"] and sum("dpo_plain" in line for line in english) == 2
    assert [line.split("|")[1:7] for line in chinese[2:]] == [
        line.split("|")[1:7] for line in english[2:]
    ]


def test_no_source_is_left_in_english_in_the_chinese_readme():
    """Outside links and code, the words that remain are names."""
    text = "\n".join(
        line.split("|")[7]
        for line in readme_table.recipes_table("README.zh-TW.md").splitlines()[2:]
    )
    words = set(re.findall("[A-Za-z]+", re.sub(r"\(http[^)]*\)", "", text)))
    assert words <= {
        "TRL",
        "GPT",
        "Qwen",
        "B",
        "Instruct",
        "DPO",
        "QLoRA",
        "Zephyr",
        "ORPO",
        "Mistral",
        "Trainer",
        "transformers",
        "e",
    }

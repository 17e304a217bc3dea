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
from tools import bench_table, readme_table, results_table, run_labs, tables

LAB = "Lab-1.7-DPO_Alignment"


def write_notebook(folder, name, *sources):
    path = folder / LAB / name
    path.parent.mkdir(parents=True, exist_ok=True)
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


def test_the_deep_dives_run_after_the_main_notebooks_and_only_when_asked_for(
    tmp_path, monkeypatch, capsys
):
    for name in ("02-B.ipynb", "deep-dives/01-C.ipynb"):
        write_notebook(tmp_path, name, "1")
    monkeypatch.setattr(run_labs, "ROOT", tmp_path)
    monkeypatch.setattr(run_labs, "results_table", lambda folder: "")
    asked = []
    monkeypatch.setattr(run_labs, "run_all", lambda paths, *_: asked.append(paths) or {})
    for arguments in ([], ["--deep-dives"], ["deep-dives/"]):
        run_labs.main(arguments)
    names = [[run_labs.name_of(path) for path in paths] for paths in asked]
    main, dive = f"{LAB}/02-B.ipynb", f"{LAB}/deep-dives/01-C.ipynb"
    assert names == [[main], [main, dive], [dive]]


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
    of_instructions = {"constraints_met": None, "all_met": None}
    return dict.fromkeys(results_table.MEASURE_NAMES, 0.25) | of_instructions | values


def write_results(path, **models):
    rates = {"dpo_vs_sft": {"wins": 5, "ties": 2, "losses": 3, "rate": 0.6, "ci95": [0.4, 0.8]}}
    path.write_text(json.dumps({"models": models, "win_rate": rates}))


def cells(text: str) -> dict[str, list[str]]:
    """Rows of Markdown tables by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_results_show_what_was_measured_and_a_dash_for_what_was_not(tmp_path):
    sft = model(kl=None, std={"perplexity": 0.1})
    write_results(tmp_path / "evaluation.json", sft=sft, dpo=model(perplexity=7.5), base=model())
    text = results_table.results_table(tmp_path)
    rows = cells(text)
    assert "|  | SFT | DPO |" in text
    assert rows["perplexity"] == ["0.250 ± 0.100", "7.500"]
    assert rows["KL to SFT (nats)"] == ["–", "0.250"]
    assert rows["dpo_vs_sft"] == ["60.0% [40.0%, 80.0%]", "5", "2", "3"]


def test_the_results_of_the_real_model_show_its_start_and_its_own_measures(tmp_path):
    """Nothing is harmless or helpful from 1 to 5 there, and relevance is a share."""
    own = {"helpfulness": None, "harmlessness": None, "constraints_met": 0.5, "all_met": 0.3}
    write_results(tmp_path / "evaluation.json", base=model(**own), dpo=model(**own))
    report = json.loads((tmp_path / "evaluation.json").read_text())
    report["win_rate"] = {"dpo_vs_base": report["win_rate"]["dpo_vs_sft"]}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    text = results_table.results_table(tmp_path)
    rows = cells(text)
    assert "|  | START | DPO |" in text and rows["constraints met"] == ["0.500", "0.500"]
    assert {"relevance", "KL to the start (nats)"} <= rows.keys()
    assert not {"helpfulness (1–5)", "helpfulness"} & rows.keys()


@pytest.mark.parametrize(("age", "stages"), [(-1, "SFT | DPO"), (1, "SFT | DPO | ORPO")])
def test_a_comparison_older_than_the_evaluation_is_left_out(tmp_path, age, stages):
    write_results(tmp_path / "evaluation.json", sft=model(), dpo=model())
    write_results(tmp_path / "comparison.json", orpo=model())
    now = (tmp_path / "evaluation.json").stat().st_mtime
    os.utime(tmp_path / "comparison.json", (now + age, now + age))
    assert f"|  | {stages} |" in results_table.results_table(tmp_path)


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


def test_a_table_has_a_header_a_rule_and_its_rows():
    assert tables.markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_table_of_times_has_a_row_per_notebook_and_says_what_was_not_measured():
    """80.4 s is 1 min 20 s; 620 MB is 0.62 GB; the last row adds times, and takes the peak.

    Deep dives come after the main notebooks, with a sum of their own.
    """
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
    dive = f"{LAB}/deep-dives/01-C.ipynb"
    both[dive] = {"wall_seconds": 7, "peak_memory_bytes": 900e6}
    text = readme_table.times_table(results)
    rows = cells(text)
    assert rows["notebook"] == ["`cpu`", "`smoke`"]
    assert rows[f"[Lab-1.7 01-A]({LAB}/01-A.ipynb)"] == ["1 min 20 s · 0.62 GB", "3 s · 0.05 GB"]
    assert rows[f"[Lab-1.7 02-B]({LAB}/02-B.ipynb)"] == ["5 s · 0.10 GB", "not measured"]
    assert rows["all"] == ["1 min 25 s · 0.62 GB", "3 s · 0.05 GB"]
    assert rows[f"[Lab-1.7 deep-dives/01-C]({dive})"] == ["7 s · 0.90 GB", "not measured"]
    assert rows["all deep dives"] == ["7 s · 0.90 GB", "not measured"]
    assert text.endswith("- `smoke`: 2 cores (X), 8 GB of memory; torch 2\n")


def test_only_the_text_between_the_comments_changes_and_it_must_be_there():
    old = "a\n<!-- notebook times -->\nold\n<!-- /notebook times -->\nb\n"
    assert readme_table.updated(old, "notebook times", "new\n") == old.replace("old", "new")
    with pytest.raises(ValueError, match="found 0"):
        readme_table.updated("no comments", "notebook times", "new\n")


def blocks_of(text: str) -> list[str]:
    return [name for name in readme_table.BLOCKS if f"<!-- {name} -->" in text]


PAGES = [
    page
    for pattern in readme_table.PAGES
    for page in sorted(readme_table.ROOT.glob(pattern))
    if blocks_of(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(readme_table.ROOT).as_posix()
)
def test_the_figures_on_a_page_are_the_recorded_ones(page):
    """Nobody types them: `python -m tools.readme_table` brings a page up to date."""
    text = page.read_text(encoding="utf-8")
    assert readme_table.filled(page, text) == text


def test_every_block_has_its_page():
    """A table that no page holds would be made for nobody."""
    shown = {name for page in PAGES for name in blocks_of(page.read_text(encoding="utf-8"))}
    assert shown == set(readme_table.BLOCKS)


def test_a_page_is_filled_in_its_language_with_links_from_where_it_lies():
    """The same block on a page of docs/ leads one folder up."""
    page = "<!-- notebook times -->\n<!-- /notebook times -->\n<!-- step -->\n<!-- /step -->\n"
    docs = readme_table.ROOT / "docs"
    english = readme_table.filled(docs / "results.md", page)
    assert f"](../{LAB}/01-Setup_and_Data.ipynb)" in english and "| notebook |" in english
    assert "[All variants](../benchmarks/results/step.md)" in english
    chinese = readme_table.filled(docs / "results.zh-TW.md", page)
    assert f"](../{LAB}/01-Setup_and_Data.ipynb)" in chinese and "| 筆記本 |" in chinese
    assert "機器：2 核心" in chinese


def test_a_broken_pair_of_comments_names_its_page():
    with pytest.raises(ValueError, match="README.md: expected one pair of 'gpu' comments, found 0"):
        readme_table.filled(readme_table.ROOT / "README.md", "<!-- gpu -->\nno end\n")


def test_without_a_gpu_every_full_size_profile_is_not_measured():
    """Three methods each, and four cells a row; the tiny profiles are not there."""
    lines = bench_table.gpu_markdown(None).splitlines()[2:]
    profiles = [name for name, profile in PROFILES.items() if profile.model != TINY]
    assert [line.split(" | ")[0] for line in lines] == [
        f"| `{name}`" for name in profiles for _ in range(3)
    ]
    assert all(line.count("not measured") == 4 for line in lines)


def test_results_are_read_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS_FOLDER", tmp_path)
    (tmp_path / "step.json").write_text('{"thresholds": []}')
    assert tables.read_results("step") == {"thresholds": []}
    assert tables.read_results("gpu") is None


def test_the_measured_line_names_the_profiles_that_were_not_measured():
    """80.4 s is 1 min 20 s; only `cpu` has a time here."""
    timing = {"wall_seconds": 80.4, "peak_memory_bytes": 620e6}
    results = {"cpu": {"notebooks": {f"{LAB}/01-A.ipynb": timing}}}
    line = readme_table.measured_line(results, f"{LAB}/01-A.ipynb")
    missing = ", ".join(f"`{name}`" for name in PROFILES if name != "cpu")
    assert line.endswith(f"`cpu` 1 min 20 s · 0.62 GB. Not measured: {missing}.")


def test_the_measured_line_goes_into_the_first_cell(tmp_path):
    first = nbformat.v4.new_markdown_cell("# A\n<!-- measured --> Measured: long ago.", id="cell-0")
    nbformat.write(new_notebook(cells=[first]), tmp_path / "a.ipynb")
    readme_table.mark_notebook(tmp_path / "a.ipynb", "<!-- measured --> Measured: now.")
    assert nbformat.read(tmp_path / "a.ipynb", 4).cells[0].source.endswith("Measured: now.")
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / "b.ipynb")
    with pytest.raises(ValueError, match="b.ipynb: expected one `<!-- measured -->`"):
        readme_table.mark_notebook(tmp_path / "b.ipynb", "now")


def test_the_recipes_are_the_profiles_own():
    """A stage has a row; plain DPO only where its rate differs. 0.0004 is written 4e-4."""
    lines = readme_table.recipes_table().splitlines()
    assert (
        "| `smoke` | `dpo` | 4e-4 | 0.1 |  | 3 | rate: ours, tuned on seeds 0–2; β: "
        in "\n".join(lines)
    )
    assert (
        "| `cpu` | `orpo` | 5e-3 |  | 0.5 | 2 | rate: ours, tuned on seeds 0–2; λ: the lab page |"
        in lines
    )
    stages = [line.split("`")[3] for line in lines[2:] if line.startswith("| `qlora-7b`")]
    assert stages == ["sft", "dpo", "orpo"] and sum("dpo_plain" in line for line in lines) == 2


TRANSLATED = [name for name in readme_table.BLOCKS if not name.startswith("claims")]


@pytest.mark.parametrize("name", TRANSLATED)
def test_no_word_is_left_in_english_on_a_page_in_chinese(name):
    """Outside code and links, the words that remain are names; every number and link is kept."""
    english = readme_table.BLOCKS[name](str)
    chinese = tables.in_chinese(english)
    shown = re.sub(r"`[^`]*`|\[Lab[^]]*\]\([^)]*\)|\]\([^)]*\)", "", chinese)
    for path in tables.RESULTS_FOLDER.glob("*.json"):  # the names of the measuring processors
        for processor in re.findall(r'"cpu": "([^"]+)"', path.read_text(encoding="utf-8")):
            shown = shown.replace(processor, "")
    names = (
        "TRL GPT Qwen B Instruct DPO QLoRA Zephyr ORPO Mistral Trainer transformers e SFT KL NLL "
        "EOS LoRA GB M FLOPs TFLOPs token prompt epoch adapter profile packed simple compact nat "
        "CPU python torch trl cpu float"
    )
    assert set(re.findall("[A-Za-z]+", shown)) <= set(names.split())
    digits = "[0-9.]*[0-9]"
    assert sorted(re.findall(digits, chinese)) == sorted(re.findall(digits, english))
    assert re.findall(r"\]\([^)]*\)", chinese) == re.findall(r"\]\([^)]*\)", english)

"""The form of the notebooks: short enough, exercises that can be graded, figures with words, links.

A rule is a function of a notebook, and returns a line for each place that breaks it. NOT_YET names
the notebooks that are still to be told again by these rules; a notebook that keeps them all must
leave the list.
"""

import ast
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
MAIN = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("Lab-*/*.ipynb"))
DIVES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("Lab-*/deep-dives/*.ipynb"))
NOT_YET: set[str] = set()
TRAIN_EARLY = ("02-SFT", "03-DPO", "04-Evaluation", "02-ORPO", "03-Compare")
CELLS, WORDS = 75, 1_800
LINES, LONG_SHARE, LONGEST = 15, 0.1, 30  # of a code cell; at most a tenth may be longer
TRAINS = re.compile(r"\btrain(_from_base)?\(lab|\.backward\(\)")
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
FINGERPRINT = re.compile(r"^([\w.-]+): (?:trained|reused).*\(fingerprint ([0-9a-f]+)\)$", re.M)


@cache
def read(name: str):
    return nbformat.read(ROOT / name, as_version=4)


def code_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook) -> str:
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return "\n\n".join(cells)


def said(cell) -> str:
    """What a code cell printed or showed as plain text."""
    parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "\n".join(parts)


# The rules of a main notebook


def it_is_short(notebook, name: str) -> list[str]:
    cells, words = len(notebook.cells), len(re.findall(r"\w+", text_of(notebook)))
    wrong = [f"{cells} cells: at most {CELLS}"] * (cells > CELLS)
    return wrong + [f"{words} words of Markdown: at most {WORDS}"] * (words > WORDS)


def it_trains_early(notebook, name: str) -> list[str]:
    """In the first third of its cells, where training is its subject."""
    trains = [
        k for k, c in enumerate(notebook.cells) if c.cell_type == "code" and TRAINS.search(c.source)
    ]
    if not any(part in name for part in TRAIN_EARLY):
        return []
    late = not trains or trains[0] >= len(notebook.cells) / 3
    return [f"its first training is cell {trains[:1]} of {len(notebook.cells)}"] * late


def its_cells_are_short(notebook, name: str) -> list[str]:
    """Answers of exercises are left out: the student sees a stub."""
    cells = [cell for cell in code_of(notebook) if BEGIN not in cell.source]
    lines = {cell.id: sum(map(bool, map(str.strip, cell.source.splitlines()))) for cell in cells}
    long = {key: count for key, count in lines.items() if count > LINES}
    wrong = [f"{key} has {n} lines: at most {LONGEST}" for key, n in long.items() if n > LONGEST]
    many = len(long) > LONG_SHARE * len(cells)
    return wrong + [f"cells of over {LINES} lines: {', '.join(long)}"] * many


def no_cell_asks_which_profile_runs(notebook, name: str) -> list[str]:
    asks = re.compile(r"\bif\b[^\n]*(profile\.name|run_name|LAB_PROFILE)")
    return [f"{c.id} branches on the profile" for c in code_of(notebook) if asks.search(c.source)]


def claims_are_linked(notebook, name: str) -> list[str]:
    """Every D- and O-number is a link to its claim."""
    text = text_of(notebook)
    linked = re.sub(r"\[[^]]*\]\([^)]*docs/claims\.md#[do]\d+\)", "", text)
    bare = re.findall(r"\b[DO]\d{1,2}\b", re.sub(r"`[^`]*`|\$[^$]*\$", "", linked))
    wrong = [f"{claim} is no link to docs/claims.md" for claim in dict.fromkeys(bare)]
    for shown, target in re.findall(r"\[([DO]\d{1,2})\]\([^)]*#(\w+)\)", text):
        wrong += [f"{shown} is linked to #{target}"] * (shown.lower() != target)
    return wrong


def hours_are_stated(notebook, name: str) -> list[str]:
    first = notebook.cells[0].source
    there = re.search(r"\b(hours?|minutes)\b", first) and "<!-- measured -->" in first
    return [] if there else ["the first cell does not state a student's time, and what it takes"]


# Exercises


def answer_and_stub(source: str) -> tuple[ast.FunctionDef | None, ast.FunctionDef | None]:
    """The function of an exercise with its answer, and without it."""
    stub = re.sub(rf"(?s)[ ]*{BEGIN}.*?{END}", "    raise NotImplementedError", source)
    found = []
    for text in (source, stub):
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        found.append(functions[-1] if functions else None)
    return tuple(found)


def wrong_of_exercise(before, cell, check) -> list[str]:
    """What is wrong with an exercise: its text, its cell and its check."""
    function, stub = answer_and_stub(cell.source)
    if function is None or stub is None:
        return [f"{cell.id} defines no function"]
    name, wrong = function.name, []
    heading = re.search(rf"^### Exercise · {name} \(level ([123])\)$", before.source, re.M)
    level = int(heading[1]) if heading else 0
    if not heading:
        wrong.append(f"{name}: no heading `### Exercise · {name} (level 1|2|3)` above it")
    solution = {"grade": False, "solution": True, "locked": False, "task": False}
    solution |= {"grade_id": name, "schema_version": 3}
    tested = {"grade": True, "solution": False, "locked": True, "points": 2 * level, "task": False}
    tested |= {"grade_id": f"check_{name}", "schema_version": 3}
    wrong += [f"{name}: metadata {cell.metadata}"] * (cell.metadata.get("nbgrader") != solution)
    wrong += [f"{name}: the check's metadata"] * (check.metadata.get("nbgrader") != tested)
    asks = f'check("{name}", {name})'
    wrong += [f"{name}: the cell after it does not call {asks}"] * (asks not in check.source)
    wrong += [f"{name}: one answer"] * (cell.source.count(BEGIN) != 1)
    doc = ast.get_docstring(stub)
    body = [node for node in stub.body if not isinstance(node, ast.Expr)]
    whole = doc and len(body) == 1 and isinstance(body[0], ast.Raise)
    wrong += [f"{name}: without its answer it is not a docstring and nothing else"] * (not whole)
    copied = re.search(r"\b(import|from)\s+common\b|\bcommon\.", cell.source)
    return wrong + [f"{name}: its answer uses common"] * bool(copied)


def bound_by_import(source: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def exercises_can_be_graded(notebook, name: str) -> list[str]:
    cells, wrong, names = notebook.cells, [], {}
    for place, cell in enumerate(cells):
        marked = cell.metadata.get("nbgrader", {}).get("solution")
        if BEGIN in cell.source or marked:
            wrong += wrong_of_exercise(cells[place - 1], cell, cells[place + 1])
            names[answer_and_stub(cell.source)[0].name] = place
        wrong += [f"{cell.id} is tagged"] * bool({*cell.metadata.get("tags", [])})
    wrong += ["there is no exercise"] * (not names)
    # An exercise that is not solved stops nobody: what follows uses the function of `common`.
    for exercise, place in names.items():
        imported = False
        for after in cells[place + 2 :]:
            if after.cell_type == "code":
                imported |= exercise in bound_by_import(shell_free(after.source))
                tree = ast.walk(ast.parse(shell_free(after.source)))
                used = any(isinstance(n, ast.Name) and n.id == exercise for n in tree)
                wrong += [f"{after.id} uses the student's {exercise}"] * (used and not imported)
    return wrong


def shell_free(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if line.lstrip()[:1] not in ("!", "%"))


# Rules of every notebook


def figures_are_told_in_words(notebook, name: str) -> list[str]:
    wrong = []
    for cell in code_of(notebook):
        for output in cell.outputs:
            alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            lacks = "image/png" in output.get("data", {}) and len(alt) < 20
            wrong += [f"a figure of {cell.id} has no alt text"] * lacks
    return wrong


def links_lead_somewhere(notebook, name: str) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(notebook)):
        if re.match(r"[a-z]+:|attachment:|#", target):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path
        if not page.exists():
            wrong.append(f"no file {target}")
        elif anchor and anchor not in anchors(page):
            wrong.append(f"no heading {target}")
    return wrong


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as a forge makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads]
    return {*plain, *re.findall(r'<a (?:id|name)="([^"]+)"', page.read_text(encoding="utf-8"))}


def one_run_made_all(notebooks: dict[str, object]) -> list[str]:
    """A run that several notebooks name has one fingerprint in all of them."""
    found = {}
    for name, notebook in notebooks.items():
        for cell in code_of(notebook):
            for run, fingerprint in FINGERPRINT.findall(said(cell)):
                found.setdefault(run, {}).setdefault(fingerprint, []).append(name)
    return [f"{run}: {where}" for run, where in found.items() if len(where) > 1]


FORM = [
    it_is_short,
    it_trains_early,
    its_cells_are_short,
    no_cell_asks_which_profile_runs,
    claims_are_linked,
    hours_are_stated,
    exercises_can_be_graded,
    figures_are_told_in_words,
    links_lead_somewhere,
]
OF_EVERY = [figures_are_told_in_words, links_lead_somewhere, claims_are_linked, hours_are_stated]


@pytest.mark.parametrize("name", [name for name in MAIN if name not in NOT_YET])
@pytest.mark.parametrize("rule", FORM, ids=lambda rule: rule.__name__)
def test_a_notebook_keeps_the_rule(name, rule):
    assert rule(read(name), name) == []


@pytest.mark.parametrize("name", DIVES)
@pytest.mark.parametrize("rule", OF_EVERY, ids=lambda rule: rule.__name__)
def test_a_deep_dive_keeps_the_rule(name, rule):
    assert rule(read(name), name) == []


def test_what_is_still_to_be_told_again_is_a_notebook_that_breaks_a_rule():
    """The list shrinks to nothing."""
    assert set(MAIN) >= NOT_YET
    assert all(any(rule(read(name), name) for rule in FORM) for name in NOT_YET)


def test_all_outputs_are_of_one_run():
    assert one_run_made_all({name: read(name) for name in MAIN + DIVES}) == []


# That each rule notices when it is broken

ANSWER = f'''def double(x):
    """Twice x."""
    {BEGIN}
    return 2 * x
    {END}'''


def exercise(**changes):
    """The three cells of a good exercise; `changes`: other sources, by their place."""
    flags = {"solution": True, "grade": False, "locked": False, "task": False, "schema_version": 3}
    locked = {"solution": False, "grade": True, "locked": True, "task": False, "schema_version": 3}
    locked |= {"points": 4, "grade_id": "check_double"}
    cells = [
        new_markdown_cell("### Exercise · double (level 2)"),
        new_code_cell(ANSWER, metadata={"nbgrader": flags | {"grade_id": "double"}}),
        new_code_cell('check("double", double)', metadata={"nbgrader": locked}),
    ]
    for place, source in changes.items():
        cells[int(place[1:])].source = source
    return cells


PNG = {"image/png": "AAAA", "text/plain": "a figure"}
TRAINING = 'train(lab, "sft")'
LONG = "\n".join("x = 1" for _ in range(31))
BROKEN = [
    (it_is_short, [new_markdown_cell("a") for _ in range(76)], "76 cells"),
    (it_is_short, [new_markdown_cell("word " * 1801)], "1801 words"),
    (it_trains_early, [*map(new_code_cell, ("1", "1", TRAINING))], "[2] of 3"),
    (it_trains_early, [new_code_cell("1")], "[] of 1"),
    (its_cells_are_short, [new_code_cell(LONG)], "31 lines"),
    (its_cells_are_short, [new_code_cell(LONG[:120])], "cells of over 15 lines"),
    (no_cell_asks_which_profile_runs, [new_code_cell("if profile.name == 1:\n    x")], "branches"),
    (claims_are_linked, [new_markdown_cell("Claim D5 holds")], "D5 is no link"),
    (claims_are_linked, [new_markdown_cell("[D5](../docs/claims.md#d6)")], "D5 is linked to #d6"),
    (hours_are_stated, [new_markdown_cell("# A\n<!-- measured -->")], "time"),
    (exercises_can_be_graded, [new_markdown_cell("none")], "no exercise"),
    (exercises_can_be_graded, exercise(c0="### Exercise · double"), "no heading"),
    (exercises_can_be_graded, exercise(c1=ANSWER.replace("2 *", "common.f(2) *")), "uses common"),
    (exercises_can_be_graded, exercise(c1=f"y = 2\n{ANSWER}\n    return 1"), "docstring and no"),
    (exercises_can_be_graded, exercise(c1=ANSWER.replace("double", "twice")), "twice: no heading"),
    (exercises_can_be_graded, exercise(c2="double(2)"), "does not call"),
    (exercises_can_be_graded, [*exercise(), new_code_cell("y = double(3)")], "the student"),
    (
        figures_are_told_in_words,
        [new_code_cell("draw()", outputs=[new_output("display_data", PNG)])],
        "no alt text",
    ),
    (links_lead_somewhere, [new_markdown_cell("[a](gone.md)")], "no file gone.md"),
    (links_lead_somewhere, [new_markdown_cell("[a](README.md#gone)")], "no heading README.md#gone"),
]
GOOD = [
    new_markdown_cell("# A\n<!-- measured --> 2 hours, [D5](../docs/claims.md#d5)"),
    new_code_cell('%time\nsft = train(lab, "sft")'),
    *exercise(),
    new_code_cell("from common.x import double\n\ndouble(3)"),
    new_code_cell("draw()", outputs=[new_output("display_data", PNG)]),
]
GOOD[-1].outputs[0].metadata = {"image/png": {"alt": "Figure. Loss against step."}}
HERE = "Lab-1.7-DPO_Alignment/02-SFT_Baseline.ipynb"


@pytest.mark.parametrize(("rule", "cells", "words"), BROKEN)
def test_a_rule_notices_when_it_is_broken(rule, cells, words):
    assert any(words in line for line in rule(new_notebook(cells=cells), HERE))


@pytest.mark.parametrize("rule", FORM, ids=lambda rule: rule.__name__)
def test_a_rule_leaves_a_good_notebook_alone(rule):
    good = new_notebook(cells=GOOD[1:] if rule is links_lead_somewhere else GOOD)
    assert rule(good, HERE) == []


def test_outputs_of_two_runs_are_noticed():
    def notebook(fingerprint):
        text = f"sft: reused, trained before in 2 s (fingerprint {fingerprint})\n"
        return new_notebook(
            cells=[new_code_cell("1", outputs=[new_output("stream", text=text, name="stdout")])]
        )

    same = {"a": notebook("ab12"), "b": notebook("ab12")}
    assert one_run_made_all(same) == []
    [line] = one_run_made_all(same | {"c": notebook("cd34")})
    assert line == "sft: {'ab12': ['a', 'b'], 'cd34': ['c']}"

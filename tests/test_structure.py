"""The rules of the tree, as DESIGN.md states them, and that each rule notices when it is broken.

A rule is a function of a folder that holds the tree; it returns a line for each place that breaks
it. The imports are read from syntax trees. One process really imports every module, to see that
this reading is right.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = ("common", "deploy", "tools", "benchmarks")
TAUGHT = (
    "profiles",
    "toyworld",
    "instructions",
    "data",
    "models",
    "logprobs",
    "packed",
    "losses",
    "lab",
    "evaluation",
    "judges",
    "comparison",
    "costs",
    "environment",
)
# A module imports what stands before it here, or beside it in the same line; a longer name goes
# before a shorter one.
ORDER = [
    "io",
    "profiles",
    "toyworld",
    "instructions",
    "data",
    "models",
    "logprobs",
    "packed",
    "losses",
    "lab",
    "evaluation",
    "judges",
    "judging",
    "memory.meter",
    "training",
    "comparison",
    "costs",
    "memory",
    "environment",
    "plots",
    "checks",
]
APART = [("evaluation", "lab"), ("judges", "lab"), ("plots", "memory"), ("training.trainer", "lab")]
TWICE = {"main", "response_logps"}  # of command lines; the readable and the packed path
LINES_OF_A_FILE, LINES_OF_TAUGHT, LINES_OF_ALL = 330, 3_600, 20_000
LOADED = {"Lab-1.7-DPO_Alignment/01": 20}  # modules of ours that a notebook loads at the most
LOADED_BY_ANY = 42


# What the tree holds


def modules(root: Path, trees: tuple[str, ...] = TREES) -> dict[str, Path]:
    """Every module of some trees: its dotted name → its file."""
    files = (path for tree in trees for path in sorted((root / tree).rglob("*.py")))
    names = {}
    for path in files:
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


parsed = cache(ast.parse)


def statements(code: ast.AST, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of some code; those inside of functions only if `lazy`."""
    for node in ast.iter_child_nodes(code):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(node, lazy)


def imports(source: str, known: dict[str, Path], lazy: bool = True) -> set[str]:
    """The modules of `known` that a source names in its import statements."""
    names = set()
    for node in statements(parsed(source), lazy):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:  # `from common import data` names a module; `from common.data import x` does not
            assert not node.level, f"a relative import: {ast.unparse(node)}"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in known else node.module for name in inner}
    return {name for name in names if name in known}


def graph(root: Path, lazy: bool = True) -> dict[str, set[str]]:
    """Every module of ours → the modules of ours that it imports."""
    known = modules(root)
    return {
        name: imports(path.read_text(encoding="utf-8"), known, lazy) for name, path in known.items()
    }


def behind(names: set[str], edges: dict[str, set[str]]) -> set[str]:
    """Some modules and all that they import, directly or not."""
    found, waiting = set(), list(names)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += edges[name]
    return found


def loaded(root: Path, names: set[str]) -> set[str]:
    """The modules of ours that are loaded when `names` are imported, their packages too."""
    edges = graph(root, lazy=False)
    for name, found in edges.items():
        found |= {name.rpartition(".")[0]} & edges.keys()
    return behind(names, edges)


def notebook_code(path: Path) -> str:
    """The code cells of a notebook as one source, without commands to the shell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join(line for line in code.splitlines() if line.lstrip()[:1] not in ("!", "%"))


def notebooks(root: Path) -> dict[str, str]:
    """Every notebook: its path → its code."""
    paths = sorted(root.glob("Lab-*/**/*.ipynb"))
    return {path.relative_to(root).as_posix(): notebook_code(path) for path in paths}


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# The rules


def taught_files_are_those_of_the_design(root: Path) -> list[str]:
    files = {path.stem for path in root.glob("common/*.py")} - {"__init__"}
    wrong = [f"common/{name}.py is not in the design" for name in sorted(files - set(TAUGHT))]
    return wrong + [f"common/{name}.py is missing" for name in TAUGHT if name not in files]


def taught_files_are_imported_by_a_notebook(root: Path) -> list[str]:
    known = modules(root)
    used = set().union(*(imports(code, known) for code in notebooks(root).values()))
    here = {path.stem for path in root.glob("common/*.py")} - {"__init__"}
    return [f"no notebook imports common.{name}" for name in here if f"common.{name}" not in used]


def taught_files_are_short_together(root: Path) -> list[str]:
    lines = sum(map(lines_of, root.glob("common/*.py")))
    wrong = lines > LINES_OF_TAUGHT
    return [f"the files directly in common/ have {lines} lines: {LINES_OF_TAUGHT}"] * wrong


def files_are_short(root: Path) -> list[str]:
    lines = {path.relative_to(root).as_posix(): lines_of(path) for path in modules(root).values()}
    return [f"{path} has {n} lines" for path, n in lines.items() if n > LINES_OF_A_FILE]


def all_files_are_short_together(root: Path) -> list[str]:
    lines = sum(map(lines_of, modules(root).values()))
    return [f"{TREES} have {lines} lines: at most {LINES_OF_ALL}"] * (lines > LINES_OF_ALL)


def common_imports_only_common(root: Path) -> list[str]:
    known = modules(root, (*TREES, "instructor", "tests"))
    wrong = []
    for name, path in modules(root, ("common",)).items():
        found = imports(path.read_text(encoding="utf-8"), known)
        wrong += [f"{name} imports {other}" for other in found if not inside(other, "common")]
    return wrong


def plots_are_imported_by_notebooks_and_commands_only(root: Path) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, found in graph(root).items()
        for other in found
        if inside(other, "common.plots")
        and not inside(name, "common.plots", "benchmarks", "tools")
        and not name.endswith(".__main__")
    ]


def serving_imports_only_itself(root: Path) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, found in graph(root).items()
        for other in found
        if inside(name, "deploy.serving") and not inside(other, "deploy.serving")
    ]


def place(name: str) -> int | None:
    """Where a module of common stands in ORDER; None for `common` itself and for command lines."""
    for length in (3, 2):  # common.memory.meter before common.memory
        short = ".".join(name.split(".")[1:length])
        if short in ORDER:
            return ORDER.index(short)
    return None


def no_import_runs_back_up(root: Path) -> list[str]:
    wrong = []
    for name, found in graph(root).items():
        if not inside(name, "common") or name.endswith("__main__") or name == "common":
            continue
        if place(name) is None:
            wrong.append(f"{name} has no place in the order")
            continue
        for other in found - {"common"}:
            pair = tuple(".".join(each.split(".")[1:]) for each in (name, other))
            apart = any(inside(pair[0], a) and inside(pair[1], b) for a, b in APART)
            if apart or (place(other) or 0) > place(name):
                wrong.append(f"{name} imports {other}")
    return wrong


def no_import_goes_in_a_circle(root: Path) -> list[str]:
    edges = graph(root)
    around = {name: behind(found, edges) for name, found in edges.items()}
    return [
        f"{name} is in a circle with {', '.join(sorted(n for n in found if name in around[n]))}"
        for name, found in around.items()
        if name in found
    ]


def public_names(source: str) -> set[str]:
    """The functions, classes and constants that a module defines."""
    names = set()
    for node in parsed(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = ast.walk(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
            names |= {
                leaf.id for leaf in targets if isinstance(leaf, ast.Name) and leaf.id.isupper()
            }
    return {name for name in names if not name.startswith("_")}


def public_names_are_used_once(root: Path) -> list[str]:
    where = {}
    for name, path in modules(root).items():
        for public in public_names(path.read_text(encoding="utf-8")) - TWICE:
            where.setdefault(public, []).append(name)
    return [f"{public}: {', '.join(names)}" for public, names in where.items() if len(names) > 1]


def formatting_is_never_switched_off(root: Path) -> list[str]:
    files = modules(root, (*TREES, "tests")).values()
    words = ("fmt: " + "skip", "fmt: " + "off")
    return [
        f"{path.relative_to(root).as_posix()}:{number} {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(word in line for word in words)
    ]


def notebooks_load_few_modules(root: Path) -> list[str]:
    known, wrong = modules(root), []
    for path, code in notebooks(root).items():
        count = len(loaded(root, imports(code, known)))
        most = min([LOADED_BY_ANY, *(n for start, n in LOADED.items() if path.startswith(start))])
        if count > most:
            wrong.append(f"{path} loads {count} modules of ours: at most {most}")
    return wrong


RULES = [
    taught_files_are_those_of_the_design,
    taught_files_are_imported_by_a_notebook,
    taught_files_are_short_together,
    files_are_short,
    all_files_are_short_together,
    common_imports_only_common,
    plots_are_imported_by_notebooks_and_commands_only,
    serving_imports_only_itself,
    no_import_runs_back_up,
    no_import_goes_in_a_circle,
    public_names_are_used_once,
    formatting_is_never_switched_off,
    notebooks_load_few_modules,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule):
    wrong = rule(ROOT)
    assert not wrong, f"{rule.__name__}:\n" + "\n".join(wrong)


ALONE = """
import importlib, json, sys

def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] in trees]:
        del sys.modules[name]

trees, names, notebooks = json.load(sys.stdin)
failed, loaded = {}, {}
for name in names:
    forget()
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
for notebook, lines in notebooks.items():
    forget()
    for line in lines:
        try:
            exec(line)
        except Exception as error:
            failed[f"{notebook}: {line}"] = f"{type(error).__name__}: {error}"
    loaded[notebook] = sorted(name for name in sys.modules if name.partition(".")[0] in trees)
print(json.dumps([failed, loaded]))
"""


@pytest.fixture(scope="module")
def imported():
    """What one process found: modules that cannot be imported alone; what each notebook loads."""
    lines = {
        path: [ast.unparse(node) for node in statements(ast.parse(code), lazy=True)]
        for path, code in notebooks(ROOT).items()
    }
    question = json.dumps([TREES, list(modules(ROOT)), lines])
    answer = subprocess.run(
        [sys.executable, "-c", ALONE], input=question, cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert answer.returncode == 0
    return json.loads(answer.stdout.splitlines()[-1])


def test_each_module_can_be_imported_alone_and_notebooks_import_what_is_there(imported):
    assert not imported[0], "\n".join(f"{name}: {error}" for name, error in imported[0].items())


def test_what_a_notebook_loads_is_what_the_syntax_trees_say(imported):
    """This keeps the count of `notebooks_load_few_modules` honest."""
    known = modules(ROOT)
    said = {p: sorted(loaded(ROOT, imports(code, known))) for p, code in notebooks(ROOT).items()}
    assert said == imported[1]


@pytest.fixture
def small_tree(tmp_path):
    """A tree of almost empty files that keeps every rule; as a function that adds to its files."""

    def add(changes: dict[str, str]) -> Path:
        for name, text in changes.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_text() if path.exists() else ""
            path.write_text(old + text)
        return tmp_path

    lab = "\n".join(f"from common import {name}" for name in TAUGHT[1:])
    for notebook, code in (("01-A", "import common.profiles"), ("02-B", lab)):
        cells = [{"cell_type": "code", "source": code}]
        add({f"Lab-1.7-DPO_Alignment/{notebook}.ipynb": json.dumps({"cells": cells})})
    folders = ("io", "training", "plots", "memory", "checks")
    add({f"common/{name}.py": "" for name in ("__init__", *TAUGHT)})
    add({f"common/{folder}/__init__.py": "" for folder in folders})
    add({"deploy/__init__.py": "", "deploy/serving/app.py": "from deploy.serving import store\n"})
    add({"deploy/serving/__init__.py": "", "deploy/serving/store.py": "LIMIT = 1\n"})
    add(
        {
            "deploy/export.py": "",
            "tools/show.py": "from common.plots import bars\n",
            "benchmarks/step.py": "",
        }
    )
    add({"common/plots/bars.py": "from common import losses\n\ndef draw(): pass\n"})
    add({"common/training/__main__.py": "import common.plots.bars\n\ndef main(): pass\n"})
    return add


BROKEN = [
    (taught_files_are_those_of_the_design, "common/extra.py", "", "common/extra.py"),
    (taught_files_are_imported_by_a_notebook, "common/extra.py", "", "common.extra"),
    (taught_files_are_short_together, "common/data.py", "\n" * 3601, "3601 lines"),
    (files_are_short, "common/io/hub.py", "\n" * 331, "common/io/hub.py has 331"),
    (all_files_are_short_together, "deploy/quantize.py", "\n" * (LINES_OF_ALL + 1), "at most"),
    (common_imports_only_common, "common/lab.py", "import deploy.serving", "common.lab"),
    (common_imports_only_common, "common/io/a.py", "def f(): from tools import show", "tools.show"),
    (
        plots_are_imported_by_notebooks_and_commands_only,
        "common/training/__init__.py",
        "def train():\n    from common.plots import bars",
        "common.training imports common.plots.bars",
    ),
    (
        plots_are_imported_by_notebooks_and_commands_only,
        "deploy/export.py",
        "import common.plots",
        "deploy.export imports common.plots",
    ),
    (serving_imports_only_itself, "deploy/serving/a.py", "import common.data", "common.data"),
    (serving_imports_only_itself, "deploy/serving/a.py", "import deploy.export", "deploy.export"),
    (no_import_runs_back_up, "common/data.py", "import common.models", "common.data"),
    (no_import_runs_back_up, "common/losses.py", "from common.training import x", "common.losses"),
    (no_import_runs_back_up, "common/io/a.py", "def f(): import common.data", "common.io.a"),
    (no_import_runs_back_up, "common/evaluation.py", "import common.lab", "common.lab"),
    (no_import_runs_back_up, "common/training/trainer.py", "import common.lab", "common.lab"),
    (no_import_runs_back_up, "common/plots/a.py", "import common.memory", "common.memory"),
    (no_import_runs_back_up, "common/new/a.py", "", "common.new.a has no place"),
    (no_import_goes_in_a_circle, "deploy/serving/store.py", "import deploy.serving.app", "store"),
    (public_names_are_used_once, "deploy/a.py", "def draw(): pass", "draw: common.plots.bars"),
    (public_names_are_used_once, "tools/a.py", "LIMIT: int = 2", "LIMIT"),
    (public_names_are_used_once, "tools/a.py", "class draw: pass", "draw"),
    (formatting_is_never_switched_off, "tools/a.py", "A = 1  # fmt: " + "skip", "tools/a.py:1"),
]


@pytest.mark.parametrize(("rule", "file", "text", "words"), BROKEN)
def test_a_rule_notices_when_it_is_broken(rule, file, text, words, small_tree):
    assert rule(small_tree({})) == []
    assert any(words in line for line in rule(small_tree({file: text})))


@pytest.mark.parametrize(("notebook", "most"), [("01-A", 20), ("03-C", 42)])
def test_a_notebook_that_loads_one_module_more_is_noticed(notebook, most, small_tree):
    """A package counts as a module too: `common`, `common.io`, and the rest in it."""
    cells = [{"cell_type": "code", "source": "%time\nimport common.io.m2"}]
    path = f"Lab-1.7-DPO_Alignment/{notebook}.ipynb"
    root = small_tree(
        {f"common/io/m{n}.py": f"import common.io.m{n + 1}\n" for n in range(2, most)}
    )
    (root / path).write_text(json.dumps({"cells": cells}))
    small_tree({f"common/io/m{most}.py": ""})
    [line] = notebooks_load_few_modules(root)
    assert line.startswith(f"{path} loads {most + 1} modules")
    (root / f"common/io/m{most - 1}.py").write_text("")
    assert notebooks_load_few_modules(root) == []


def test_a_file_that_is_missing_is_noticed(small_tree):
    root = small_tree({})
    (root / "common/losses.py").unlink()
    assert taught_files_are_those_of_the_design(root) == ["common/losses.py is missing"]

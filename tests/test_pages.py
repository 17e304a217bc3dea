"""The pages name what is there: links, modules, make targets and files of the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-TW.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("Lab-*/README*.md"))
OURS = ("common", "deploy", "tools", "benchmarks")


def wrong_names(page: Path, root: Path = ROOT) -> list[str]:
    """What a page names and the tree does not have."""
    text = page.read_text(encoding="utf-8")
    wrong = []
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
            wrong.append(f"link {target}")
    for module in re.findall(rf"-m ((?:{'|'.join(OURS)})[\w.]*)", text):
        path = root.joinpath(*module.rstrip(".").split("."))
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            wrong.append(f"python -m {module}")
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.M)
    wrong += [
        f"make {name}"
        for name in re.findall(r"`(?:LAB_\w+=\S+ )?make ([a-z-]+)", text)
        if name not in targets
    ]
    for path in re.findall(rf"`((?:{'|'.join(OURS)}|tests|docs|configs)/[\w./-]+)`", text):
        if not (root / path).exists():
            wrong.append(f"path {path}")
    tests = "".join(path.read_text(encoding="utf-8") for path in root.glob("tests/test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    return wrong + [f"test {name}" for name in named if f"def {name}(" not in tests]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_names_only_what_is_there(page):
    assert wrong_names(page) == []


def test_each_kind_of_wrong_name_is_found(tmp_path):
    (tmp_path / "Makefile").write_text("test: ## run\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](gone.md) `python -m common.gone` `make gone` `deploy/gone.py` `make test` `test_gone`"
    )
    assert wrong_names(page, tmp_path) == [
        "link gone.md",
        "python -m common.gone",
        "make gone",
        "path deploy/gone.py",
        "test test_gone",
    ]


def test_every_page_has_its_chinese_one():
    """The Chinese pages say the same as the English ones, page for page."""
    english = {page for page in PAGES if not page.name.endswith(".zh-TW.md")}
    assert {page.with_suffix(".zh-TW.md") for page in english} == set(PAGES) - english

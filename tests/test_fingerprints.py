"""What makes a finished run stale: code behind `common.training`, not words about it."""

import pytest

from common.io import fingerprints

TRAINING = '''"""A docstring."""
from common import losses
from common.data import collate


def train():
    """Trains."""
    from common.io.files import write  # later

    return losses.dpo(collate()) + 1
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small `common`; returns a function that changes a file of it and tells the new digest."""
    monkeypatch.setattr(fingerprints, "_ROOT", tmp_path)

    def changed(name="", text=""):
        if name:
            (tmp_path / "common" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "common" / name).write_text(text)
        return fingerprints.source_digest.__wrapped__("common.training")

    for name in (
        "__init__.py",
        "io/__init__.py",
        "io/files.py",
        "losses.py",
        "data.py",
        "plots.py",
    ):
        (tmp_path / "common" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "common" / name).write_text("A = 1\n")
    changed("training/__init__.py", TRAINING)
    return changed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A docstring."""', '"""Another one, which is\nlonger."""'),
        ('    """Trains."""\n', ""),
        ("# later", "# at the end"),
        ("losses.dpo(collate()) + 1", "(\n        losses.dpo(collate()) + 1\n    )"),
    ],
    ids=["of the module", "of a function, removed", "comment", "formatting"],
)
def test_words_and_formatting_make_nothing_stale(tree, old, new):
    before = tree()
    assert old in TRAINING
    assert tree("training/__init__.py", TRAINING.replace(old, new)) == before


@pytest.mark.parametrize(
    "name", ["training/__init__.py", "losses.py", "data.py", "io/files.py"], ids=lambda name: name
)
def test_a_changed_line_of_a_module_behind_training_makes_runs_stale(tree, name):
    """However the module is imported: by its package, by a name in it, or inside of a function."""
    before = tree()
    assert tree(name, (TRAINING if "training" in name else "") + "A = 2\n") != before


def test_a_module_further_behind_counts_too(tree):
    before = tree("losses.py", "from common import deeper\n")
    assert tree("deeper.py", "A = 1\n") != before
    assert tree("deeper.py", "A = 1\n") != tree("deeper.py", "A = 2\n")


def test_a_module_that_training_does_not_import_makes_nothing_stale(tree):
    assert tree() == tree("plots.py", "A = 2\n")


def test_the_data_beside_a_module_count(tree):
    before = tree()
    assert tree("data.toml", "words = []\n") != before


def test_training_is_covered_and_plots_deploy_and_checks_are_not():
    behind = set(fingerprints.modules_behind("common.training"))
    assert {f"common.{name}" for name in ("losses", "data", "models", "training.trainer")} <= behind
    outside = ("common.plots", "common.checks", "common.environment", "deploy")
    assert not [name for name in behind if name.startswith(outside)]

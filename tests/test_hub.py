"""Datasets of the hub. The real libraries talk to a hub in memory: what they raise here, they raise
for a student.
"""

import errno
import gzip
import json
from dataclasses import replace
from io import BytesIO

import datasets.config
import httpx2
import huggingface_hub.utils._http as http
import pytest
from datasets import Dataset
from fake_hub import COMMIT, FakeHub, refused
from huggingface_hub import HfFileSystem, constants, set_client_factory
from test_formats import alpaca, comparison, shp, trl, ultra

from common.data import load_demonstrations, load_lab_data, load_pairs
from common.io import hub
from common.io.formats import DataError
from common.io.hub import HH_SUBSETS, KNOWN_DATASETS, hub_source
from common.profiles import get_profile


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict]) -> bytes:
    Dataset.from_list(rows).to_parquet(file := BytesIO())
    return file.getvalue()


def hh(subset: str, split: str, count: int = 5) -> bytes:
    ask = "\n\nHuman: {} {} {}\n\nAssistant: {}"
    sides = {"chosen": "Yes.", "rejected": "No."}
    rows = [
        {side: ask.format(subset, split, n, text) for side, text in sides.items()}
        for n in range(count)
    ]
    return gzip.compress(lines(rows))


def plain(count: int) -> list[dict]:
    return [
        {"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."}
        for number in range(count)
    ]


CARD = b"---\nconfigs:\n- config_name: %s\n  data_files:\n%s---\n"
ULTRA = b"".join(
    b"  - split: %s\n    path: data/%s-*\n" % (name, name)
    for name in (b"train_prefs", b"test_prefs")
)
TWO = CARD[:-4] % (b"one", b"  - split: train\n    path: one.jsonl\n") + (
    b"- config_name: two\n  data_files:\n  - split: train\n    path: two.jsonl\n---\n"
)
REPOS = {
    "Anthropic/hh-rlhf": {
        "README.md": b"---\nlicense: mit\n---\n",
        "red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(
            lines([{"transcript": "x", "rating": 1.0}])
        ),
        **{
            f"{subset}/{split}.jsonl.gz": hh(subset, split)
            for subset in KNOWN_DATASETS["Anthropic/hh-rlhf"].subsets
            for split in ("train", "test")
        },
    },
    "stanfordnlp/SHP": {
        f"{domain}/{split}.json": lines(
            [shp(history=f"{domain} {split} {n}?", score_ratio=n + 0.5) for n in range(4)]
        )
        for domain in ("askbaking", "askculinary")
        for split in ("train", "validation", "test")
    },
    "openai/summarize_from_feedback": {
        "comparisons/train/0000.parquet": parquet([comparison(), comparison(0, title="Two cats")]),
        "comparisons/validation/0000.parquet": parquet([comparison()]),
        "axis/test/0000.parquet": parquet([{"summary": {"text": "a"}}]),
    },
    "HuggingFaceH4/ultrafeedback_binarized": {
        "README.md": CARD % (b"default", ULTRA),
        "data/train_prefs-00000-of-00001.parquet": parquet([ultra(), ultra(scores=(8.5, 8.5))]),
        "data/test_prefs-00000-of-00001.parquet": parquet([ultra()]),
    },
    "trl-lib/ultrafeedback_binarized": {
        f"data/{split}-00000-of-00001.parquet": parquet([trl()]) for split in ("train", "test")
    },
    "tatsu-lab/alpaca": {
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(
            [alpaca(str(n)) for n in range(40)]
        )
    },
    "owner/plain": {"train.jsonl": lines(plain(60))},
    "owner/two": {"README.md": TWO, "one.jsonl": lines(plain(2)), "two.jsonl": lines(plain(3))},
    "owner/script": {"script.py": b"import os"},
    "owner/mixed": {"a.jsonl": lines(plain(1)), "b.jsonl": lines([shp()])},
    "owner/odd": {"data/dev-0.jsonl": lines(plain(3))},
    "owner/damaged": {"train.jsonl": lines(plain(3))[:-9]},
    "owner/empty": {"README.md": b""},
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(
        http.time, "sleep", lambda seconds: None
    )  # between the library's own retries
    HfFileSystem.clear_instance_cache()
    server = FakeHub(REPOS)
    set_client_factory(server.client)
    yield server
    set_client_factory(http.default_client_factory)
    HfFileSystem.clear_instance_cache()


def offline(monkeypatch, fake) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    fake.fault = lambda request: httpx2.ConnectError("no route")


# --- what is read


def test_hh_rlhf_is_all_four_subsets_without_the_red_team(fake):
    train, report = load_pairs("Anthropic/hh-rlhf", "train")
    known = KNOWN_DATASETS["Anthropic/hh-rlhf"]
    assert len(train) == 20 and {prompt.split()[1] for prompt in train["prompt"]} == set(
        known.subsets
    )
    assert report.source == "Anthropic/hh-rlhf (split train, revision 09be8c5bbc57)"
    asked = [
        line
        for line in fake.log
        if " /datasets/Anthropic" in line or " /api/datasets/Anthropic" in line
    ]
    assert asked and all(known.revision in line for line in asked)


@pytest.mark.parametrize("subset", KNOWN_DATASETS["Anthropic/hh-rlhf"].subsets)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_subset_of_hh_rlhf(fake, subset, split):
    prompts = load_pairs(f"Anthropic/hh-rlhf:{subset}", split)[0]["prompt"]
    assert prompts == [f"\n\nHuman: {subset} {split} {number}\n\nAssistant:" for number in range(5)]


def test_shp_by_domain_with_its_own_splits(fake):
    """Score ratios 0.5, 1.5, 2.5, 3.5: two of the four are kept. `validation` is a split of its
    own.
    """
    for split in ("train", "validation", "test"):
        pairs, report = load_pairs("stanfordnlp/SHP:askculinary", split)
        assert pairs["prompt"] == [
            f"\n\nHuman: askculinary {split} {n}?\n\nAssistant:" for n in (2, 3)
        ]
        assert dict(report.dropped) == {"score ratio under 2": 2}
    assert len(load_pairs("stanfordnlp/SHP", "train")[0]) == 4


def test_summaries_are_read_from_the_hubs_parquet_copy(fake):
    """`main` holds a script; test is called validation; `axis` has other columns."""
    train, report = load_pairs("openai/summarize_from_feedback", "train")
    test = load_pairs("openai/summarize_from_feedback", "test")[0]
    assert (len(train), len(test)) == (2, 1) and train["prompt"][0].startswith(
        "\n\nHuman: SUBREDDIT: r/AskReddit"
    )
    assert report.source == f"openai/summarize_from_feedback (split train, revision {COMMIT[:12]})"
    assert any("revision/refs/convert/parquet" in line for line in fake.log)


def test_ultrafeedback_of_both_publishers(fake):
    train, report = load_pairs("HuggingFaceH4/ultrafeedback_binarized", "train")
    assert len(train) == 1 and "split train_prefs" in report.source and report.dropped.total() == 1
    assert len(load_pairs("HuggingFaceH4/ultrafeedback_binarized", "test")[0]) == 1
    assert load_pairs("trl-lib/ultrafeedback_binarized", "test")[0].to_list() == train.to_list()


def test_alpaca_has_no_test_split_and_is_held_out_by_prompt(fake):
    train, test, whole = (
        load_demonstrations("tatsu-lab/alpaca", split)[0] for split in ("train", "test", None)
    )
    assert 0 < len(test) < 12 and not set(train["prompt"]) & set(test["prompt"])
    assert sorted([*train["prompt"], *test["prompt"]]) == sorted(whole["prompt"])


def test_a_dataset_without_a_test_split_is_held_out_as_a_local_file_is(fake):
    """Six of the first sixty questions or so, the same ones on every machine, streamed or not."""
    for split in ("train", "test"):
        here = load_pairs(plain(60), split)[0].to_list()
        assert load_pairs("owner/plain", split)[0].to_list() == here
        assert load_pairs("owner/plain", split, limit=3)[0].to_list() == here[:3]


def test_a_configuration_is_named_after_the_colon(fake):
    assert [len(load_pairs(f"owner/two:{name}")[0]) for name in ("one", "two")] == [2, 3]


def test_a_limit_downloads_no_more_than_is_read(fake):
    """Three rows are in the first of the four files: the other three are not fetched."""
    assert len(load_pairs("Anthropic/hh-rlhf", "train", limit=3)[0]) == 3
    fetched = {
        line.split("/")[-2]
        for line in fake.log
        if line.startswith("GET") and line.endswith("train.jsonl.gz")
    }
    assert fetched == {"harmless-base"}


def test_held_out_rows_are_drawn_over_the_whole_split_and_the_report_says_so(fake, monkeypatch):
    """The test split is read file by file, five rows of each of four subsets: its first six rows
    are of two subsets. Twelve drawn of twenty are of all four, are the same ones again, and do not
    begin with those of one subset.
    """
    first = load_pairs("Anthropic/hh-rlhf", "test", limit=6)[0]
    assert len({prompt.split()[1] for prompt in first["prompt"]}) == 2
    monkeypatch.setenv("LAB_DATA", "Anthropic/hh-rlhf")
    profile = replace(get_profile("gpt2"), held_out=12)
    data = load_lab_data(profile)
    pairs, report = data.test, data.reports["test"]
    subsets = [prompt.split()[1] for prompt in pairs["prompt"]]
    assert len(set(pairs["prompt"])) == 12 and set(subsets) == set(HH_SUBSETS)
    assert len(set(subsets[:5])) > 1
    assert (report.rows, report.drawn) == (20, 12)
    assert "drawn       12  of the rows kept, at random over" in str(report)
    assert load_lab_data(profile).test.to_list() == pairs.to_list()


def test_an_unknown_subset_lists_those_that_there_are(fake):
    with pytest.raises(
        DataError, match="no subset 'harmless'. Its subsets: harmless-base, helpful-base, "
    ):
        load_pairs("Anthropic/hh-rlhf:harmless")
    with pytest.raises(DataError, match="'tatsu-lab/alpaca' has no subset 'all'. It has none"):
        load_demonstrations("tatsu-lab/alpaca:all")
    assert not fake.log


def test_a_missing_split_lists_those_that_there_are(fake):
    with pytest.raises(
        DataError, match="'owner/plain' has no split 'validation'. Its splits: train"
    ):
        load_pairs("owner/plain", "validation")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/b", ("a/b", None, "main")),
        ("a/b:c", ("a/b", "c", "main")),
        ("a/b@v1", ("a/b", None, "v1")),
        ("a/b:c@refs/convert/parquet", ("a/b", "c", "refs/convert/parquet")),
        ("tatsu-lab/alpaca@main", ("tatsu-lab/alpaca", None, "main")),
        ("a", None),
        ("a/b/c", None),
        ("a/b.jsonl", None),
        ("a\\b.csv", None),
        ("/a/b", None),
        ("a/b.csv", None),
    ],
)
def test_names_of_datasets(text, parts):
    found = hub_source(text)
    assert (found and (found.name, found.subset, found.revision)) == parts


def test_every_dataset_has_a_stated_revision():
    assert all(
        len(known.revision) == 40 or known.revision == "refs/convert/parquet"
        for known in KNOWN_DATASETS.values()
    )


# --- what is kept


def test_the_second_time_nothing_is_asked(fake, monkeypatch):
    first, report = load_pairs("HuggingFaceH4/ultrafeedback_binarized", "train")
    fake.log.clear()
    offline(monkeypatch, fake)
    again, kept = load_pairs("HuggingFaceH4/ultrafeedback_binarized", "train")
    assert again.to_list() == first.to_list() and kept == report and not fake.log


@pytest.mark.parametrize("change", ["code", "revision", "limit", "split", "reader"])
def test_another_question_is_asked_again(fake, monkeypatch, change):
    name = "stanfordnlp/SHP:askbaking"
    load_pairs(name, "train")
    fake.log.clear()
    if change == "code":
        monkeypatch.setattr(hub, "_code", lambda: ["changed"])
    ask = {
        "code": lambda: load_pairs(name, "train"),
        "revision": lambda: load_pairs(f"{name}@{'d' * 40}", "train"),
        "limit": lambda: load_pairs(name, "train", limit=1),
        "split": lambda: load_pairs(name, "test"),
        "reader": lambda: load_demonstrations(name, "train"),
    }
    ask[change]()
    assert fake.log


def test_a_revision_that_moves_is_looked_up_and_remembered_offline(fake, monkeypatch):
    first = load_pairs("owner/plain", "train")[0].to_list()
    fake.log.clear()
    assert (
        load_pairs("owner/plain", "train")[0].to_list() == first and len(fake.log) == 1
    )  # only the look-up
    moved = httpx2.Response(200, json={"id": "owner/plain", "sha": "e" * 40, "siblings": []})
    fake.fault = lambda request: (
        moved if "/api/datasets/owner/plain/revision/main" in str(request.url) else None
    )
    assert "eeeeeeeeeeee" in load_pairs("owner/plain", "train")[1].source
    offline(monkeypatch, fake)
    assert "eeeeeeeeeeee" in load_pairs("owner/plain", "train")[1].source


def test_offline_the_libraries_own_copy_is_found(fake, monkeypatch):
    first = load_pairs("owner/plain", "train")[0].to_list()
    monkeypatch.setattr(hub, "_code", lambda: ["changed"])
    offline(monkeypatch, fake)
    assert load_pairs("owner/plain", "train")[0].to_list() == first


def test_what_is_kept_and_broken_is_made_anew(fake):
    first = load_pairs("owner/plain")[0].to_list()
    [rows] = hub.cache_folder().glob("*/rows.arrow")
    rows.write_bytes(rows.read_bytes()[:50])
    assert load_pairs("owner/plain")[0].to_list() == first


def test_a_disk_without_room_for_the_copy_is_a_warning(fake, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.io.files.os.replace", full)
    with pytest.warns(UserWarning, match="not kept for the next time .*The disk is full"):
        assert len(load_pairs("owner/plain", limit=3)[0]) == 3


# --- failures


def data(request: httpx2.Request) -> bool:
    return (
        request.method == "GET"
        and "/resolve/" in str(request.url)
        and str(request.url).endswith((".jsonl", ".gz"))
    )


def everywhere(found):
    return lambda request: found() if callable(found) else found


def in_data(found):
    return lambda request: found() if data(request) else None


def cut(request: httpx2.Request):
    """The connection ends in the middle of a file."""
    if data(request):
        return httpx2.Response(200, headers={"ETag": '"a"'}, content=b'{"prompt": "Que')
    return None


FAULTS = {
    "offline": (
        "owner/plain",
        everywhere(lambda: httpx2.ConnectError("no route")),
        "cannot be reached. Connect once",
    ),
    "slow": (
        "owner/plain",
        everywhere(lambda: httpx2.ConnectTimeout("slow")),
        "cannot be reached. Connect once",
    ),
    "gated": (
        "owner/plain",
        everywhere(lambda: refused(403, "GatedRepo")),
        "gated. Accept its terms .*`hf auth",
    ),
    "no token": (
        "owner/plain",
        everywhere(lambda: refused(401, "GatedRepo")),
        "gated. Accept its terms",
    ),
    "no name": (
        "owner/none",
        everywhere(None),
        "none of this name, or it is private. Check the spelling",
    ),
    "no revision": (
        "owner/plain@v9",
        everywhere(lambda: refused(404, "RevisionNotFound")),
        "no such revision. Name",
    ),
    "no config": (
        "owner/two",
        everywhere(None),
        "several configurations. Name one of them: LAB_DATA=owner/name:con",
    ),
    "wrong config": (
        "owner/two:three",
        everywhere(None),
        "several configurations.*Available: .'one', 'two'",
    ),
    "script": (
        "owner/script",
        everywhere(None),
        "loading script, .* refused.*@refs/convert/parquet",
    ),
    "mixed": ("owner/mixed", everywhere(None), "different columns. Name one configuration"),
    "no data": ("owner/empty", everywhere(None), "no data file at this place. Check the subset"),
    "too many": (
        "owner/plain",
        everywhere(lambda: refused(429)),
        "takes no more requests for now. Wait some minutes",
    ),
    "broken hub": (
        "owner/plain",
        everywhere(lambda: refused(503)),
        "an error of its own. Try again later",
    ),
    "hung up": (
        "owner/plain",
        in_data(lambda: httpx2.RemoteProtocolError("peer closed")),
        "interrupted. Run again",
    ),
    "too slow": (
        "owner/plain",
        in_data(lambda: httpx2.ReadTimeout("slow")),
        "interrupted. Run again",
    ),
    "cut": ("owner/plain", cut, "interrupted. Run again"),
    "damaged": ("owner/damaged", everywhere(None), "cut off or damaged; .*Run again"),
}


IN_DATA = ("hung up", "too slow", "cut", "damaged")  # the others come before any row is read


@pytest.mark.parametrize(
    ("name", "limit"), [*((name, None) for name in FAULTS), *((name, 3) for name in IN_DATA)]
)
def test_a_failure_of_the_hub_says_what_to_do(fake, name, limit):
    """Whole splits are downloaded; with a limit, rows are streamed."""
    source, fake.fault, sentence = FAULTS[name]
    with pytest.raises(
        DataError, match=f"Could not load the dataset '.*' from the hub: .*{sentence}"
    ) as raised:
        load_pairs(source, limit=limit)
    assert "LAB_DATA to a local file, or use LAB_PROFILE=cpu" in str(raised.value)
    assert str(raised.value).count("\n") == 0
    assert not list(hub.cache_folder().glob("*/rows.arrow"))


def test_the_offline_switch_is_named(fake, monkeypatch):
    offline(monkeypatch, fake)
    with pytest.raises(
        DataError, match="HF_HUB_OFFLINE is set, and there is no copy on this machine. Unset it"
    ):
        load_pairs("owner/plain")


@pytest.mark.parametrize(
    "place",
    [
        "datasets.arrow_writer.ArrowWriter.write_table",
        "datasets.arrow_writer.ArrowWriter.finalize",
        "huggingface_hub.file_download._download_to_tmp_and_move",
    ],
)
def test_a_full_disk_is_named(fake, monkeypatch, place):
    """Where the rows are written, where their file is ended, where the download is written."""

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(DataError, match="the disk is full. Free some space, or set HF_HOME"):
        load_pairs("owner/plain")


def test_too_little_disk_is_named(fake, monkeypatch):
    """What the library itself foresees before it writes."""
    monkeypatch.setattr(
        "datasets.builder.has_sufficient_disk_space", lambda *arguments, **options: False
    )
    with pytest.raises(DataError, match="the disk is full"):
        load_pairs("owner/plain")


def test_an_interrupted_download_goes_on_when_it_is_run_again(fake):
    fake.fault = FAULTS["hung up"][1]
    with pytest.raises(DataError, match="interrupted"):
        load_pairs("owner/plain")
    fake.fault = lambda request: None
    assert len(load_pairs("owner/plain")[0]) == 60


# --- in a lab


def test_a_lab_on_a_hub_dataset_without_a_test_split(fake, monkeypatch):
    monkeypatch.setenv("LAB_DATA", "owner/plain")
    profile = get_profile("smoke")
    data = load_lab_data(profile)
    assert profile.run_name == "smoke@plain" and data.name == "plain" and data.world is None
    assert len(data.test) > 0 and not set(data.train["prompt"]) & set(data.test["prompt"])
    assert "owner/plain (split train" in str(data.reports["test"])


def test_subsets_have_run_folders_of_their_own(monkeypatch):
    for name, folder in (
        ("stanfordnlp/SHP", "SHP"),
        ("stanfordnlp/SHP:askbaking", "SHP-askbaking"),
        ("a/b@v1", "b-v1"),
        ("a/b:c@refs/convert/parquet", "b-c-refs-convert-parquet"),
    ):
        monkeypatch.setenv("LAB_DATA", name)
        assert get_profile("smoke").run_name == f"smoke@{folder}"

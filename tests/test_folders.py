"""Folders of texts: data sets as the hub gives them, packed files, and what is passed over is said."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from click.testing import Result

from command_line import Refuse
from documents import parquet, png, read_documents
from inputs import write_jsonl
from onecard.calibration import read_text
from onecard.calibration.folders import WANTED, TextFolder
from onecard.calibration.source import ReadLimit, Source
from onecard.calibration.sources import read_source
from onecard.core.errors import InputError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def touch(folder: Path, *names: str) -> Path:
    """Files that hold their own name as their text."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            parquet(path, [{"text": name}])
        elif ".json" in name:
            write_jsonl(path, [{"text": name}])
        else:
            path.write_text(name)
    return folder


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A data set as the hub's client fetches it."""
    folder = touch(
        tmp_path / "fetched",
        *(f"data/{split}-0000{n}-of-00002.parquet" for split in ("train", "test", "validation") for n in (0, 1)),
        *("README.md", "LICENSE.txt", "LICENSE", ".gitattributes", ".cache/train.jsonl"),
    )
    (folder / "dataset_info.json").write_text('{\n  "features": {}\n}')
    (folder / "statistics.json").write_text('{"rows": 4}')
    (folder / "figure.png").write_bytes(png())
    return folder


@pytest.mark.parametrize(("which", "split"), [("calibration", "train"), ("evaluation", "test")])
def test_of_a_data_set_one_split_is_read_and_the_rest_is_named(data_set: Path, which: str, split: str) -> None:
    found = read_source(Source("mine", data_set, splits=WANTED[which]), ReadLimit(), None)
    names = [f"data/{split}-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert [document.text for document in found.documents] == names
    assert list(found.read) == names
    others = sorted({"train", "test", "validation"} - {split})
    assert list(found.passed_over) == [
        *(f"data/{other}-0000{n}-of-00002.parquet (split {other})" for other in others for n in (0, 1)),
        "LICENSE.txt",
        "README.md",
        "dataset_info.json",
        "statistics.json",
        "1 x without a suffix",
        "1 x .png",
    ]


CHOICES: dict[str, tuple[list[str], str, list[str]]] = {
    "no split is named": (["a.jsonl", "b.txt"], "evaluation", ["a.jsonl", "b.txt"]),
    "without a name it is train": (["a.jsonl", "test.jsonl"], "calibration", ["a.jsonl"]),
    "test is evaluated": (["a.jsonl", "test.jsonl"], "evaluation", ["test.jsonl"]),
    "validation is evaluated": (["train.jsonl", "dev.jsonl"], "evaluation", ["dev.jsonl"]),
    "there is nothing but a test": (["x_test.jsonl", "README.md"], "calibration", ["x_test.jsonl"]),
    "folders name splits": (["train/0.jsonl", "test/0.jsonl"], "evaluation", ["test/0.jsonl"]),
    "splits within a split": (
        ["train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"],
        "calibration",
        ["train_gen-00000-of-00001.parquet", "train_sft-00000-of-00001.parquet"],
    ),
    "one of them": (["train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"], "train_sft", []),
    "a digest behind the shard": (
        [f"data/train_{kind}-00000-of-00003-a3ecf92756993583.parquet" for kind in ("sft", "gen")],
        "train_sft",
        [],
    ),
    "a split by its short name": (["dev.jsonl", "train.jsonl"], "dev", []),
    "papers": (["a.jsonl", "README_zh.md", "LICENSE-MIT.txt", "requirements.txt"], "calibration", ["a.jsonl"]),
    "a word is no split": (["latest.jsonl", "contest.jsonl"], "evaluation", ["contest.jsonl", "latest.jsonl"]),
    "pages are no splits": (
        ["testing.md", "test/a.md", "README.md"],
        "calibration",
        ["README.md", "test/a.md", "testing.md"],
    ),
    "plain splits": (["train.txt", "test.txt"], "evaluation", ["test.txt"]),
    "packed": (["train.jsonl.gz", "test.jsonl.zst", "LICENSE.md"], "calibration", ["train.jsonl.gz"]),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_which_files_are_read(tmp_path: Path, kind: str) -> None:
    names, which, expected = CHOICES[kind]
    folder = TextFolder(touch(tmp_path / "texts", *names), WANTED.get(which, (which,)))
    assert [path.as_posix() for path in folder.read] == (expected or names[:1])


def test_rows_of_two_files_with_one_name_have_two_names(tmp_path: Path) -> None:
    names = [f"{language}/part.{kind}" for language in ("de", "en") for kind in ("jsonl", "parquet", "txt")]
    ids = {document.id for document in read_documents(touch(tmp_path / "texts", *names))}
    assert ids == {f"{language}/part{end}" for language in ("de", "en") for end in (":1", ":0", ".txt")}


def test_links_are_followed_once_and_broken_ones_are_named(tmp_path: Path) -> None:
    folder, other = touch(tmp_path / "texts", "a.txt"), touch(tmp_path / "other", "b.txt")
    (folder / "linked").symlink_to(other)
    (folder / "round").symlink_to(folder)
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    found = read_source(Source("mine", folder), ReadLimit(), None)
    assert list(found.read) == ["a.txt", "linked/b.txt"]
    assert list(found.passed_over) == ["gone.jsonl (a broken link)"]


def test_a_name_with_half_a_character_that_is_passed_over_is_told(tmp_path: Path) -> None:
    folder = touch(tmp_path / "texts", "a.jsonl", "test-\udcff.jsonl")
    (name,) = read_source(Source("mine", folder), ReadLimit(), None).passed_over
    assert name == "test-\\udcff.jsonl (split test)"


def test_rows_in_a_json_file_are_never_passed_over(tmp_path: Path) -> None:
    """Also a single one; and an array is refused by its name, not left out."""
    folder = touch(tmp_path / "texts", "a.txt")
    (folder / "b.json").write_text('{"text": "one row"}')
    (folder / "c.json").write_text('{"text": "two"}\n{"text": "rows"}\n')
    assert [document.text for document in read_documents(folder)] == ["a.txt", "one row", "two", "rows"]
    (folder / "d.json").write_text('[\n{"text": "an array"}\n]')
    with pytest.raises(InputError, match=r"d\.json hold one JSON array"):
        read_documents(folder)


def test_a_split_that_is_not_there_is_refused(data_set: Path) -> None:
    with pytest.raises(InputError, match="of the split dev_sft; it has test, train, validation"):
        read_source(Source("mine", data_set, splits=("dev_sft",)), ReadLimit(), None)


def test_what_was_read_is_told_and_recorded(
    baby: Callable[..., Path],
    data_set: Path,
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Both sets from one folder: its train split calibrates, its test split is evaluated."""
    for split in ("train", "test"):
        rows = [{"text": f"{split} {n}, and more words that are to be read"} for n in range(20)]
        parquet(data_set / f"data/{split}-00000-of-00002.parquet", rows)
    said = [option for which in ("--calibration", "--evaluation") for option in (which, data_set)]
    result = onecard("quantize", baby("qwen3"), tmp_path / "out", "--recipe", recipe(), *said)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out" / "onecard.json").read_text())
    for which, split in (("calibration", "train"), ("evaluation", "test")):
        (facts,) = record["texts"][which]["sources"]
        assert facts["documents"] >= 7
        assert facts["read"] == [f"data/{split}-0000{n}-of-00002.parquet" for n in (0, 1)]
        assert "README.md" in facts["passed_over"]
        told = f"of fetched {which} reads data/{split}-00000-of-00002.parquet"
        assert any(warning.startswith(told) for warning in record["warnings"])
        assert told in result.stderr.replace("\n", " ")


# --- packed files


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_packed_file_is_the_same_as_the_plain_one(tmp_path: Path, suffix: str, kind: str) -> None:
    """Also in two members one after the other, as `cat` leaves them."""
    lines = [json.dumps({"text": f"line {n} \u00e9\u2028"}) + "\n" for n in range(3000)]
    (tmp_path / f"x.{kind}").write_text("".join(lines))
    packed = tmp_path / f"x.{kind}.{suffix}"
    packed.write_bytes(b"".join(PACK[suffix]("".join(half).encode()) for half in (lines[:1000], lines[1000:])))
    plain, other = read_documents(tmp_path / f"x.{kind}"), read_documents(packed)
    assert [document.digest for document in plain] == [document.digest for document in other]
    if kind == "jsonl":
        assert [document.id for document in plain] == [document.id for document in other]


@pytest.mark.parametrize("suffix", PACK)
def test_a_packed_file_that_is_damaged_or_a_bomb(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x.jsonl.{suffix}"
    data = PACK[suffix]("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(999)).encode())
    for wrong in (data[:-9], data[:40] + b"\0\1\2\3" + data[44:], b"no such file", b""):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=r"cannot be unpacked|not UTF-8|are empty"):
            read_documents(path)
    monkeypatch.setattr(read_text, "ALWAYS_ALLOWED_BYTES", 1000)
    path.write_bytes(PACK[suffix](json.dumps({"text": "0" * 3_000_000}).encode()))
    with pytest.raises(InputError, match=r"unpack to more than .* unpack it yourself"):
        read_documents(path)


def test_kinds_that_are_no_texts(baby: Callable[..., Path], refuse: Refuse, tmp_path: Path) -> None:
    for name in ("x.csv.gz", "x.parquet.gz", "x.jsonl.xz"):
        (tmp_path / name).write_bytes(gzip.compress(b"a"))
        refuse(baby("llama4-text"), name, "no known kind", arguments=["--calibration", tmp_path / name])

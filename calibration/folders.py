"""Which files of a folder are texts, and which are passed over.

A folder is the user's own, or a data set as the hub gives it: files of several splits, and papers about the data.

    read           .jsonl, .ndjson, .json, .parquet, .txt, .md; all but .parquet may be packed (.gz, .zst)
    other splits   a file that is named after another split than the wanted one: data/test-00000-of-00001.parquet,
                   train.jsonl, validation/part.jsonl. A file that names no split counts as train. Of plain texts only
                   test.txt and the like are of a split: a page called test/drive.txt or testing.md is not
    papers         README, LICENSE and the like beside data files; dataset_info.json and others that are one JSON object
                   about the data
    hidden         whatever begins with a dot; not even named
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..core.errors import InputError
from .messages import CONVERSATIONS
from .read_text import PACKED, read_text, text_stem, text_suffix

JSON_LINES, PARQUET, PLAIN = (".jsonl", ".ndjson", ".json"), (".parquet",), (".txt", ".md")
SUFFIXES = (*JSON_LINES, *PARQUET, *PLAIN)
# The splits in the order in which calibration and evaluation want them, if the user names none.
WANTED = {"calibration": ("train", "validation", "test"), "evaluation": ("test", "validation", "train")}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}$")
_PAPERS = ("readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "authors")
# So many names are recorded and shown; the others are counted.
MOST_NAMES = 20


def is_text(path: Path) -> bool:
    """Whether a file is of a kind that can be read, by its name."""
    packed = path.suffix.lower() in PACKED
    return text_suffix(path) in SUFFIXES and not (packed and text_suffix(path) in PARQUET)


def _is_one_object(path: Path) -> bool:
    """Whether a .json file is one object that is no row of texts: dataset_info.json, state.json, statistics."""
    if text_suffix(path) != ".json":
        return False
    try:
        value = json.loads(read_text(path))
    except (InputError, ValueError, RecursionError):  # lines of JSON, or what will be refused when it is read
        return False
    return isinstance(value, dict) and not value.keys() & {"text", *CONVERSATIONS}


def split_of(path: Path) -> tuple[str, str]:
    """(the split's exact name, train, test or validation) of a data file, by its path within the folder."""
    stem = text_stem(path)
    shard = _SHARD.match(stem)
    if text_suffix(path) in PLAIN:
        whole = _SPLIT_WORDS.get(stem.lower(), "train") if text_suffix(path) == ".txt" else "train"
        return whole, whole
    for name in (stem, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z]+", name.lower())
        found = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)
        if found is not None:
            return (shard[1] if shard and name == stem else found), found
    return (shard[1] if shard else "train"), "train"


@dataclass(frozen=True)
class TextFolder:
    """A folder of texts. `splits`: those that are wanted, the first that there is."""

    path: Path
    splits: tuple[str, ...] = WANTED["calibration"]

    @cached_property
    def _files(self) -> list[Path]:
        """All files that are not hidden, by their paths within the folder."""
        found = (p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file())
        return sorted(p for p in found if not any(part.startswith(".") for part in p.parts))

    @cached_property
    def _texts(self) -> list[Path]:
        texts = [p for p in self._files if is_text(p) and not _is_one_object(self.path / p)]
        if any(text_suffix(p) not in PLAIN for p in texts):
            texts = [p for p in texts if text_suffix(p) not in PLAIN or p.name.split(".")[0].lower() not in _PAPERS]
        return texts

    @cached_property
    def split(self) -> str | None:
        """The split that is read; None if the folder has no text of any that is wanted."""
        there = {name for p in self._texts for name in split_of(p)}
        return next((split for split in self.splits if split in there), None)

    @cached_property
    def read(self) -> list[Path]:
        """The files that are read, by their paths within the folder. Raises InputError when there is none."""
        exact = [p for p in self._texts if split_of(p)[0] == self.split]
        like = [p for p in self._texts if split_of(p)[1] == self.split]
        # The split `train` of a folder with train_sft and train_gen is both of them.
        found = like if self.split in _SPLIT_WORDS.values() else exact
        if not found:
            others = sorted({name for p in self._texts for name in split_of(p)})
            has = f"of the split {' or '.join(self.splits)}; it has {', '.join(others)}" if others else ""
            raise InputError(
                f"the folder {self.path} holds no texts {has}".rstrip() + f": name one with {', '.join(SUFFIXES)} files"
            )
        return found

    @property
    def passed_over(self) -> list[str]:
        """What is not read: the names of texts with the reason, and how many other files there are of each kind."""
        texts, read = set(self._texts), set(self.read)
        named = [f"{p.as_posix()} (split {split_of(p)[0]})" for p in self._texts if p not in read]
        papers = [p.as_posix() for p in self._files if is_text(p) and p not in texts]
        others = [p.suffix.lower() for p in self._files if not is_text(p)]
        counted = [f"{others.count(kind)} x {kind or 'without a suffix'}" for kind in sorted(set(others))]
        return shortened(named + papers) + counted


def shortened(names: list[str]) -> list[str]:
    """The first names, and how many more there are."""
    more = len(names) - MOST_NAMES
    return names if more <= 0 else [*names[:MOST_NAMES], f"{more:,} more"]

"""The texts of the real model: documents of ten kinds, of which no two roles share one.

calibration     handbook, fortunes, python: English prose, sayings and source code
choice, test    the same kinds from other documents, and the away kinds, which calibration does not have: german,
                french, chinese, mathematics, licences, chat
pool            documents of the away kinds that are in neither: for calibration that is to be broader

The hash of a whole document's name gives its role. A page of the handbook has one name in every language, so no away
text is the translation of one that calibrates. Licences are few and quote each other, so they are given out by hand;
the model's conversations are given out in turn. A long document gives several rows, PIECES at most.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from onecard.demo import corpus

from .pages import paragraphs

HOME = ("handbook", "fortunes", "python")
LANGUAGES = {"handbook": "en-US", "german": "de-DE", "french": "fr-FR", "chinese": "zh-CN"}
AWAY = ("german", "french", "chinese", "mathematics", "licences", "chat")
ROLES = ("calibration", "choice", "test")
# What calibrates: the home kinds alone; or, for half of the tokens, the pool's texts of these kinds in equal parts.
# `some` leaves two kinds out that nothing resembles, so that it shows what breadth is worth beyond its own kinds.
MIXTURES = {"home": (), "some": ("german", "french", "mathematics", "licences"), "broad": AWAY}
BREADTH = 0.5
# Of ten documents, six calibrate, two are chosen on, and two test.
ROLE_OF_TEN = ("calibration",) * 6 + ("choice",) * 2 + ("test",) * 2
ROW_TOKENS = 512
CALIBRATION_ROWS, HOME_ROWS, AWAY_ROWS = 96, 40, 16
# What a home kind gives of the tokens that calibrate, and of the rows.
SHARES = {"handbook": 0.4, "fortunes": 0.25, "python": 0.35}
PIECES = {"handbook": 3, "python": 1, "german": 3, "french": 3, "chinese": 3, "mathematics": 2}
# A piece is filled until it has this many tokens: packing and special tokens never make it shorter than a row.
PIECE_TOKENS = ROW_TOKENS + 8
FORTUNES = (
    *("computers", "definitions", "humorists", "law", "linux", "literature", "people", "science", "songs-poems"),
    *("wisdom", "work"),
)
LICENCES = {
    "calibration": ("MPL-1.1", "BSD"),
    "choice": ("GPL-2", "GPL-3"),
    "test": ("Apache-2.0", "Artistic", "CC0-1.0", "GFDL-1.3", "MPL-2.0"),
}
# Words that show the language of a translated page. Some paragraphs of a translation are still English.
COMMON = {
    "german": frozenset(("der", "die", "das", "und", "ist", "nicht", "ein", "eine", "mit", "von", "zu", "den", "auf")),
    "french": frozenset(("le", "la", "les", "et", "est", "ne", "pas", "un", "une", "des", "de", "du", "pour", "dans")),
}
LEAST_COMMON, LEAST_CHINESE = 0.15, 0.3

Count = Callable[[str], int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Text:
    """A piece of the document `unit`, which has one role."""

    kind: str
    unit: str
    number: int
    role: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()

    def line(self) -> corpus.JsonRow:
        what: dict[str, Any] = {"text": self.text} if self.text is not None else {"messages": list(self.messages)}
        return {"id": f"{self.kind}/{self.unit}/{self.number}", "kind": self.kind} | what


def role_of(unit: str) -> str:
    """By the document's name alone: other documents do not change it."""
    return ROLE_OF_TEN[int.from_bytes(hashlib.sha256(unit.encode()).digest()[:4], "big") % len(ROLE_OF_TEN)]


def pieces(parts: Iterable[str], joint: str, count: Count, most: int) -> Iterator[str]:
    """Parts that follow one another, joined until a row is full; at most `most` pieces. What is left fills no row."""
    held: list[str] = []
    for part in parts:
        held.append(part)
        if count(joint.join(held)) >= PIECE_TOKENS:
            yield joint.join(held)
            held, most = [], most - 1
            if not most:
                return


def fits(kind: str, paragraph: str) -> bool:
    """Whether a paragraph is in the language of its kind."""
    if kind == "chinese":
        return sum("\u4e00" <= sign <= "\u9fff" for sign in paragraph) >= LEAST_CHINESE * len(paragraph)
    words = paragraph.lower().split()
    return kind not in COMMON or sum(word in COMMON[kind] for word in words) >= LEAST_COMMON * len(words)


def handbook(root: Path, kind: str, count: Count) -> Iterator[Text]:
    for path in sorted((root / "usr/share/doc/debian-handbook/html" / LANGUAGES[kind]).glob("*.html")):
        parts = [part for part in paragraphs(path.read_text(encoding="utf-8")) if fits(kind, part)]
        for number, text in enumerate(pieces(parts, "\n\n", count, PIECES[kind])):
            yield Text(kind, path.stem, number, role_of(path.stem), text)


def mathematics(root: Path, count: Count) -> Iterator[Text]:
    """The pages of SymPy's documentation that have formulas."""
    top = root / "usr/share/doc/python-sympy-doc/html"
    for path in sorted(top.rglob("*.html")):
        html = path.read_text(encoding="utf-8")
        if 'class="math"' not in html or "_modules" in path.parts:
            continue
        unit = str(path.relative_to(top).with_suffix(""))
        parts = paragraphs(html.partition('role="main"')[2].partition(">")[2])
        for number, text in enumerate(pieces(parts, "\n\n", count, PIECES["mathematics"])):
            yield Text("mathematics", unit, number, role_of(unit), text)


def fortunes(root: Path, count: Count) -> Iterator[Text]:
    """A saying is a document; those of one file and role follow one another."""
    for name in FORTUNES:
        text = (root / "usr/share/games/fortunes" / name).read_text(encoding="utf-8")
        sayings = sorted({part.strip("\n") for part in re.split(r"^%$", text, flags=re.M) if part.strip()})
        by_role = sorted(sayings, key=lambda saying: ROLES.index(role_of(saying)))
        for role, those in groupby(by_role, key=role_of):
            for number, piece in enumerate(pieces(those, "\n%\n", count, len(text))):
                yield Text("fortunes", f"{name}-{role}", number, role, piece)


def python(count: Count) -> Iterator[Text]:
    for module in corpus.modules():
        for number, text in enumerate(pieces(module.source.split("\n\n"), "\n\n", count, PIECES["python"])):
            yield Text("python", module.name, number, role_of(module.name), text)


def licences(root: Path, count: Count) -> Iterator[Text]:
    for role, names in LICENCES.items():
        for name in names:
            text = (root / "usr/share/common-licenses" / name).read_text(encoding="utf-8")
            for number, piece in enumerate(pieces(text.split("\n\n"), "\n\n", count, len(text))):
                yield Text("licences", name, number, role, piece)


def written(root: Path, count: Count) -> list[Text]:
    """Every text but the model's own."""
    return [
        *(text for kind in LANGUAGES for text in handbook(root, kind, count)),
        *fortunes(root, count),
        *python(count),
        *mathematics(root, count),
        *licences(root, count),
    ]


def spread(texts: list[Text]) -> list[Text]:
    """In an order of their own: the first pieces of all documents, then the second ones, each by the hash of its
    name."""
    return sorted(texts, key=lambda text: (text.number, hashlib.sha256(text.unit.encode()).digest()))


def _taken(texts: list[Text], kind: str, rows: int, role: str) -> list[Text]:
    found = spread([text for text in texts if (text.kind, text.role) == (kind, role)])
    if len(found) < rows:
        raise ValueError(f"{role} wants {rows} rows of {kind}, and the texts have {len(found)}")
    return found[:rows]


def _filled(items: Iterable[Item], tokens: float, count: Callable[[Item], int]) -> list[Item]:
    """The first items, until they have so many tokens."""
    found: list[Item] = []
    for item in items:
        if tokens <= 0:
            break
        found.append(item)
        tokens -= count(item)
    return found


def roles(texts: list[Text], count: Count) -> dict[str, list[Text]]:
    """The texts of each role, and those left over as the pool."""
    wanted = CALIBRATION_ROWS * ROW_TOKENS
    found: dict[str, list[Text]] = {"calibration": []}
    for kind in HOME:
        those = spread([text for text in texts if (text.kind, text.role) == (kind, "calibration")])
        found["calibration"] += _filled(those, round(SHARES[kind] * wanted), lambda text: count(text.text or ""))
    for role in ("choice", "test"):
        found[role] = [text for kind in HOME for text in _taken(texts, kind, round(SHARES[kind] * HOME_ROWS), role)]
        found[role] += [text for kind in AWAY for text in _taken(texts, kind, AWAY_ROWS, role)]
    found["pool"] = [text for text in texts if text.kind in AWAY and text.role == "calibration"]
    return found


def mixed(
    calibration: Sequence[dict[str, Any]], pool: Sequence[dict[str, Any]], kinds: Collection[str], count: Count
) -> list[dict[str, Any]]:
    """The lines that calibrate: those of `calibration`, or of each of its kinds the first half, and as many tokens of
    the pool's, in equal parts. A kind of which the pool has too little gives what there is."""
    if not kinds:
        return list(calibration)

    def first(lines: Sequence[dict[str, Any]], kind: str, tokens: float) -> list[dict[str, Any]]:
        return _filled((line for line in lines if line["kind"] == kind), tokens, lambda line: count(said(line)))

    wanted = CALIBRATION_ROWS * ROW_TOKENS
    kept = [line for kind in HOME for line in first(calibration, kind, (1 - BREADTH) * SHARES[kind] * wanted)]
    return kept + [line for kind in kinds for line in first(pool, kind, BREADTH * wanted / len(kinds))]


def said(line: dict[str, Any]) -> str:
    """The words of a text or of a conversation."""
    return line["text"] if "text" in line else "\n".join(message["content"] for message in line["messages"])


def facts(found: dict[str, list[Text]]) -> dict[str, dict[str, int]]:
    """By role and kind, how many pieces there are."""
    return {role: dict(Counter(text.kind for text in texts)) for role, texts in found.items()}

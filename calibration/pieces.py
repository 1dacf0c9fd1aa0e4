"""Token ids of a text of any length: a long text is tokenized in pieces, which give the ids of the whole.

A tokenizer keeps some 200 bytes for every character of its input, 2 GB for a text of 10 MB. So a long text is read in
windows that overlap. The rule for a cut at a place p of the text:

    both windows reach at least `context` characters beyond p, one on each side
    both have a token boundary at p, and the same tokens at the same places for half of `context` on both sides of it

Splitting into words goes from left to right, and depends on nothing before the last boundary and on no more behind it
than the run of letters, digits, marks or white space that is being read; merging stays within a word. So two windows
that agree around p agree on all the text between p and their ends: what is left of p is taken from the first window,
what is right of it from the second. Where no place near the wanted end of a piece fulfils the rule, the piece grows, at
last to the whole text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

PIECE_CHARACTERS = 131_072
CONTEXT_CHARACTERS = 2_048
# So many places are tried before a piece grows.
MOST_TRIED = 8


def token_ids(
    tokenizer: Any, text: str, specials: bool, piece: int = PIECE_CHARACTERS, context: int = CONTEXT_CHARACTERS
) -> torch.Tensor:
    """The ids of a text, int64 [T]. `specials`: with what the tokenizer puts around a text, a BOS for example."""
    if len(text) <= piece + context or not tokenizer.is_fast:
        return torch.tensor(tokenizer(text, add_special_tokens=specials)["input_ids"], dtype=torch.int64)
    before, after = _around(tokenizer) if specials else ([], [])
    parts = [torch.tensor(before, dtype=torch.int64), *_pieces(tokenizer, text, piece, context)]
    return torch.cat([*parts, torch.tensor(after, dtype=torch.int64)])


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that are put before and after every text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    place = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:place], full[place + len(bare) :]


@dataclass(frozen=True)
class _Window:
    """The tokens of text[begin:end]: ids int64 [T], and where each begins and ends in the whole text."""

    begin: int
    end: int
    ids_T: np.ndarray
    spans_T2: np.ndarray

    def before(self, place: int) -> int | None:
        """How many tokens lie before a place; None if one lies across it."""
        count = int(np.searchsorted(self.spans_T2[:, 1], place, side="right"))
        return None if count < len(self.ids_T) and self.spans_T2[count, 0] < place else count

    def around(self, place: int, reach: int) -> list[list[int]]:
        """The tokens near a place with their spans."""
        near = (self.spans_T2[:, 0] >= place - reach) & (self.spans_T2[:, 1] <= place + reach)
        return np.column_stack([self.ids_T[near], self.spans_T2[near]]).tolist()


def _window(tokenizer: Any, text: str, begin: int, end: int) -> _Window:
    begin, end = max(0, begin), min(len(text), end)
    found = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
    spans_T2 = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2) + begin
    return _Window(begin, end, np.array(found["input_ids"], dtype=np.int64), spans_T2)


def _pieces(tokenizer: Any, text: str, piece: int, context: int) -> Iterator[torch.Tensor]:
    """The ids of one piece after another."""
    window, start = _window(tokenizer, text, 0, piece + context), 0
    last, wanted = 0, piece
    while window.end < len(text):
        for place in _places(text, max(last, wanted - context // 2), wanted):
            following = _window(tokenizer, text, place - context, place + piece + context)
            stop, begin = window.before(place), following.before(place)
            if stop is not None and begin is not None and _agree(window, following, place, context // 2):
                yield torch.from_numpy(window.ids_T[start:stop])
                window, start = following, begin
                last, wanted = place, place + piece
                break
        else:  # the same window, with twice the room
            wanted += wanted - window.begin
            window = _window(tokenizer, text, window.begin, wanted + context)
    yield torch.from_numpy(window.ids_T[start:])


def _places(text: str, after: int, most: int) -> list[int]:
    """Where a piece may end, the last first: behind a word, or before one that begins a line."""

    def ends(place: int) -> bool:
        before, behind = text[place - 1], text[place]
        if before.isalnum():
            return not behind.isalnum() and behind not in "'’"
        return before == "\n" and behind.isalnum()

    return list(islice((place for place in range(most, after, -1) if ends(place)), MOST_TRIED))


def _agree(left: _Window, right: _Window, place: int, reach: int) -> bool:
    """Whether both windows have the same tokens around a place, and some on both sides of it."""
    one, other = left.around(place, reach), right.around(place, reach)
    return one == other and bool(one) and one[0][1] < place <= one[-1][1]

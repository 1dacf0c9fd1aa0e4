"""Scheme: how one weight matrix is stored. Does not import torch, so that a recipe can be read without loading it."""

import re
from dataclasses import dataclass, replace
from typing import Literal

# The group size that means one scale per row, whatever the number of inputs.
BY_ROW = -1
# bitsandbytes' grids, which are not integers in groups. Only its functions write them (arXiv 2305.14314, 2208.07339).
NF4: Literal["nf4"] = "nf4"
INT8_ROWS: Literal["int8 rows"] = "int8 rows"
NF4_BLOCK = 64
# The methods that call those functions -> their grid. All other methods give integers in groups.
GRIDS: dict[str, Literal["nf4", "int8 rows"]] = {"bnb-nf4": NF4, "bnb-int8": INT8_ROWS}
_WORDS = re.compile(r"int(?P<bits>[48]) (?:group (?P<group>\d+)|by row)(?P<asymmetric> asymmetric)?")


@dataclass(frozen=True)
class Scheme:
    """How one weight matrix is stored: integer codes of `bits`, with one scale per `group_size` inputs or per row.

    bitsandbytes has two other grids: `nf4`, 16 quantiles of a normal distribution, the flattened weight in blocks of
    `group_size`, double quantized; and `int8 rows`, one scale per row. Construction refuses contradictions with a
    ValueError, which a recipe turns into its own message.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    grid: Literal["int", "nf4", "int8 rows"] = "int"

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in (4, 8):
            problems.append(f"bits is {self.bits}; the engines load 4 and 8")
        if self.group_size != BY_ROW and (self.group_size < 8 or self.group_size % 8):
            problems.append(
                f"group_size is {self.group_size}; it must be a positive multiple of 8, or {BY_ROW} for one scale a row"
            )
        own = {NF4: (4, NF4_BLOCK, True), INT8_ROWS: (8, BY_ROW, True)}
        if self.grid in own and (self.bits, self.group_size, self.symmetric) != own[self.grid]:
            problems.append(f"the grid {self.grid} has bits, group_size and symmetric {own[self.grid]}")
        if self.grid not in ("int", *own):
            problems.append(f"grid is {self.grid!r}; int, {', '.join(own)} are known")
        if problems:
            raise ValueError("; ".join(problems))

    def __str__(self) -> str:
        """Its name in recipes, records and cards: 'int4 group 128', 'int8 by row', 'int4 group 32 asymmetric'."""
        if self.grid == NF4:
            return f"nf4 block {self.group_size}, double quantized"
        over = "by row" if self.group_size == BY_ROW else f"group {self.group_size}"
        return f"int{self.bits} {over}" + ("" if self.symmetric else " asymmetric")

    @classmethod
    def parse(cls, words: str) -> "Scheme":
        """The inverse of str() for integer schemes. Raises ValueError."""
        found = _WORDS.fullmatch(words)
        if found is None:
            raise ValueError(
                f"{words!r} is no width: write it like 'int4 group 128', 'int8 by row' or 'int4 group 32 asymmetric'"
            )
        group = BY_ROW if found["group"] is None else int(found["group"])
        return cls(int(found["bits"]), group, found["asymmetric"] is None)

    @property
    def code_min(self) -> int:
        """The least code, e.g. -8 for four bits. Asymmetric codes are signed too, shifted by their zero point."""
        return -(2 ** (self.bits - 1))

    @property
    def code_max(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def width(self, in_features: int) -> int:
        """Number of inputs that share a scale."""
        return in_features if self.group_size == BY_ROW else self.group_size

    def at(self, in_features: int) -> "Scheme":
        """The same scheme with a numeric group size, as files show it: there, one group per row is the same as by
        row."""
        return replace(self, group_size=self.width(in_features)) if self.grid == "int" else self

    def divides(self, in_features: int) -> bool:
        """Whether a matrix with that many inputs can be stored. NF4's blocks could run across rows, but then a kernel
        of bitsandbytes reads them wrongly (checkpoint/formats/bitsandbytes_read.py)."""
        return in_features % self.width(in_features) == 0

    def groups(self, in_features: int) -> int:
        """Number of groups along the inputs. The group size must divide them; that is checked before a run starts."""
        assert self.divides(in_features), (in_features, self.group_size)
        return in_features // self.width(in_features)

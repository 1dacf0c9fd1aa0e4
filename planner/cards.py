"""The known cards, and how much memory of each a program can use.

The figures come from public logs of these cards. They were not measured here.
"""

import re
from dataclasses import dataclass

from ..core.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One kind of card."""

    key: str
    name: str
    # The total memory that nvidia-smi (rocm-smi) reports.
    driver_mib: int
    # The memory that a program sees, as torch reports it in its out-of-memory messages ("GPU 0 has a total capacity of
    # 79.10 GiB"). Drivers and error correction move it by a tenth of a GiB. This is the smallest value seen.
    visible_gib: float
    # The prompt tokens that vLLM's server reads in one pass on this card. vLLM chooses them by memory, except on the
    # A100 (engine/arg_utils.py, get_batch_defaults).
    batch_tokens: int

    @property
    def visible_bytes(self) -> int:
        return int(self.visible_gib * GIB)

    @property
    def source(self) -> str:
        return f"{self.driver_mib:,} MiB by the driver, {self.visible_gib:.2f} GiB visible to a program"


CARDS = (
    Card("rtx-4090", "RTX 4090 24 GB", 24_564, 23.52, 2048),
    Card("rtx-5090", "RTX 5090 32 GB", 32_607, 31.36, 2048),
    Card("a100-40gb", "A100 40 GB", 40_960, 39.38, 2048),
    Card("l40s", "L40S 48 GB", 46_068, 44.39, 2048),
    Card("a100-80gb", "A100 80 GB", 81_920, 79.14, 2048),
    Card("h100-80gb", "H100 80 GB", 81_559, 79.10, 8192),
    Card("h100-nvl", "H100 NVL 94 GB", 95_830, 93.02, 8192),
    Card("rtx-pro-6000", "RTX PRO 6000 96 GB", 97_887, 94.96, 8192),
    Card("h200", "H200 141 GB", 143_771, 139.72, 8192),
    Card("b200", "B200 180 GB", 183_359, 178.35, 16_384),
    Card("mi300x", "MI300X 192 GB", 196_592, 191.69, 16_384),
)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_card(name: str) -> tuple[int, Card]:
    """Parse 'h100-80gb' or '2x h100-80gb' into (number of cards, card).

    Case and punctuation do not matter. The start of a key is enough if only one card's key starts with it. Raises
    InputError if the name matches no card or several, or if the number is 0.
    """
    many, wanted = re.fullmatch(r"(?:(\d+) *[x*] *)?(.*)", name.strip(), re.IGNORECASE | re.DOTALL).groups()  # type: ignore[union-attr]
    exact = [card for card in CARDS if _plain(wanted) in (_plain(card.key), _plain(card.name))]
    found = exact or [card for card in CARDS if wanted and _plain(card.key).startswith(_plain(wanted))]
    if len(found) != 1 or many == "0":
        known = ", ".join(card.key for card in CARDS)
        said = f"may be {' or '.join(card.key for card in found)}" if len(found) > 1 else f"is none of {known}"
        raise InputError(f"the card {name!r} {said}; several of one kind are written 2x{CARDS[5].key}")
    return int(many or 1), found[0]

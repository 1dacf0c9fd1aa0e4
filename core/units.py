"""How sizes, times, counts and shares are printed. Bytes are decimal units, and said as such."""

from collections.abc import Callable

# Printed in place of a figure that a record does not hold.
ABSENT = "–"


def size(count: float) -> str:
    """Decimal units, said as such: 64.9 GB, 4.4 MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600:d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def percent(share: float | None, digits: int = 2, absent: str = ABSENT) -> str:
    """0.0831 as 8.31%; `absent` for None."""
    return absent if share is None else f"{share:.{digits}%}"


def between(
    low: float | None, high: float | None, show: Callable[[float], str], absent: str = ABSENT, space: str = " "
) -> str:
    """`0.0133 to 0.0146`; `absent` where there is no interval. `space` may keep both ends on one line."""
    return absent if low is None or high is None else space.join((show(low), "to", show(high)))

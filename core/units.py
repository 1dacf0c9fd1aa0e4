"""How sizes, times and counts are printed. Bytes are decimal units, and said as such."""


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

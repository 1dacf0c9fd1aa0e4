"""The parts of a record that say what it was sized to: a card's memory, and a budget that bits were fitted to.

Read as tolerantly as all of a record (reading.py).
"""

from pydantic import BaseModel, ConfigDict, model_validator

# Of every part of a record.
PART = ConfigDict(frozen=True, allow_inf_nan=False)


class _Part(BaseModel):
    model_config = PART


class Curve(_Part):
    """Bytes on a card against tokens of context."""

    name: str
    contexts: tuple[int, ...]
    bytes: tuple[float, ...]

    @model_validator(mode="after")
    def _points(self) -> "Curve":
        if not self.contexts or len(self.contexts) != len(self.bytes):
            raise ValueError(f"{len(self.contexts)} contexts and {len(self.bytes)} bytes")
        return self


class FitRow(_Part):
    name: str
    weight_bytes: int
    left_bytes: int | None = None
    max_context: int | None = None
    max_sequences: int | None = None


class CardRow(_Part):
    gpu: str
    name: str
    source: str
    candidate: str | None = None
    all_usable_bytes: int
    left_bytes: int | None = None
    max_context: int | None = None
    max_sequences: int | None = None
    cards_needed: int | None = None


class Fit(_Part):
    """What a plan said of a card's memory (sizing.Sizing.facts)."""

    candidate: str
    gpu: str
    cards: int
    engine: str
    context: int
    sequences: int
    kv_dtype: str
    fits: bool
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    usable_bytes: int
    left_bytes: int
    max_context: int
    max_sequences: int
    candidates: tuple[FitRow, ...] = ()
    table: tuple[CardRow, ...] = ()
    curves: tuple[Curve, ...] = ()
    fit_warnings: tuple[str, ...] = ()


class Priced(_Part):
    """One unit at one width, rounded alone."""

    width: str
    bytes: int | None = None
    error: float | None = None
    kl_nats: float


class PricedUnit(_Part):
    unit: str
    role: str | None = None
    parameters: int | None = None
    widths: tuple[Priced, ...] = ()


class Together(_Part):
    """All units at one width: what their stream measured, and what their prices add up to."""

    measured_nats: float
    predicted_nats: float


class Prices(_Part):
    """pricing.Prices.facts. `scale`: what was measured of all units together over what their prices predicted."""

    units: tuple[PricedUnit, ...] = ()
    together: dict[str, Together] = {}
    scale: float | None = None
    rows: int | None = None
    tokens: int | None = None


class ChosenUnit(_Part):
    """A unit and what it got; where it is, `block` and `kind`, its name within the block."""

    unit: str
    role: str | None = None
    block: int | None = None
    kind: str | None = None
    width: str
    bytes: int


class Allocation(_Part):
    """What `bits: fit` chose, and the prices that it chose by (fitting.Fitted.facts)."""

    budget_bytes: int | None = None
    predicted_kl_nats: float
    gain: float | None = None
    units: tuple[ChosenUnit, ...] = ()
    prices: Prices | None = None

"""What a run was sized to: a record's `fit` (a card's memory) and `allocation` (a budget that bits were fitted to)."""

from pydantic import Field, model_validator

from .part import Many, Number, RecordPart


class Curve(RecordPart):
    """Bytes on a card against tokens of context."""

    name: str
    contexts: Many[int]
    bytes: Many[Number]

    @model_validator(mode="after")
    def _points(self) -> "Curve":
        if not self.contexts or len(self.contexts) != len(self.bytes):
            raise ValueError(f"{len(self.contexts)} contexts and {len(self.bytes)} bytes")
        return self


class RecipeRow(RecordPart):
    """One recipe on the card of the run."""

    name: str
    weight_bytes: int
    left_bytes: int | None = None
    max_context: int | None = None
    max_sequences: int | None = None


class CardFit(RecordPart):
    """One card, and the recipe that does best on it."""

    gpu: str
    name: str
    source: str
    candidate: str | None = None
    all_usable_bytes: int
    left_bytes: int | None = None
    max_context: int | None = None
    max_sequences: int | None = None
    cards_needed: int | None = None


class FitSummary(RecordPart):
    """What the plan said of the card's memory, in bytes on each card (planner/sizing.py)."""

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
    candidates: Many[RecipeRow] = ()
    table: Many[CardFit] = ()
    curves: Many[Curve] = ()
    fit_warnings: Many[str] = ()


class WidthPrice(RecordPart):
    """One unit at one width, all else as it was. `error`: relative, of its weights."""

    width: str
    bytes: int | None = None
    error: Number | None = None
    kl_nats: Number


class PricedUnit(RecordPart):
    unit: str
    role: str | None = None
    parameters: int | None = None
    widths: Many[WidthPrice] = ()


class Together(RecordPart):
    """All units at one width: the KL that was measured, and the sum of their prices."""

    measured_nats: Number
    predicted_nats: Number


class PriceList(RecordPart):
    """The prices of all units (bits/pricing.py). `scale`: the KL of all units together over the sum of their prices."""

    units: Many[PricedUnit] = ()
    together: dict[str, Together] = Field(default_factory=dict)
    scale: Number | None = None
    rows: int | None = None
    tokens: int | None = None


class ChosenUnit(RecordPart):
    """A unit and the width that it got. `block` and `kind` say where it is: `kind` is its name within the block."""

    unit: str
    role: str | None = None
    block: int | None = None
    kind: str | None = None
    width: str
    bytes: int


class Allocation(RecordPart):
    """The widths that `bits: fit` chose, and the prices that it chose by (bits/fitting.py)."""

    budget_bytes: int | None = None
    predicted_kl_nats: Number
    gain: Number | None = None
    units: Many[ChosenUnit] = ()
    prices: PriceList | None = None

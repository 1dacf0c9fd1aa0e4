"""Limits: what a finished run may not exceed. A recipe names them, and so may a file for `gate --limits`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Limits of one run; None, and 0 of `fail_below_expert_rows`, mean no limit.

    The measured mean is held against a limit, not an end of its interval: the same files on the same texts then always
    get the same answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    max_kl_mean_nats: float | None = Field(default=None, gt=0)
    max_kl_p99_nats: float | None = Field(default=None, gt=0)
    min_same_top1: float | None = Field(default=None, ge=0, le=1)
    # Share of the items whose answer changes.
    max_flip_rate: float | None = Field(default=None, ge=0, le=1)
    max_emitted_bytes: int | None = Field(default=None, ge=1)
    # Checked after each block; the run stops there.
    fail_below_expert_rows: int = Field(default=0, ge=0)
    # Matrices whose second moment could not be factored. Checked after each block, likewise.
    max_fallbacks: int = Field(default=0, ge=0)


def named_limits(fields: dict[str, Any]) -> dict[str, float]:
    """Those of a recipe's or a record's fields that limit something."""
    found = {key: fields[key] for key in Limits.model_fields if fields.get(key) is not None}
    return {key: value for key, value in found.items() if key != "fail_below_expert_rows" or value > 0}

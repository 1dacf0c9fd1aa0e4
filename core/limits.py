"""Limits that a finished run must keep. A recipe names them, or a file for `gate --limits`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Limits(BaseModel):
    """Limits of one run. None means no limit, and so does a `fail_below_expert_rows` of 0.

    A limit is compared with the measured figure, not with an end of its interval, so that the same files on the same
    texts always get the same answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    # Mean KL(original || quantized) over all evaluated tokens.
    max_kl_mean_nats: float | None = Field(default=None, gt=0)
    # The 99th percentile of the tokens' KL.
    max_kl_p99_nats: float | None = Field(default=None, gt=0)
    # Share of tokens whose likeliest next token is the same in both models.
    min_same_top1: float | None = Field(default=None, ge=0, le=1)
    # Share of the multiple-choice items whose answer changes.
    max_flip_rate: float | None = Field(default=None, ge=0, le=1)
    # All weight files together. Checked before any weight is read.
    max_emitted_bytes: int | None = Field(default=None, ge=1)
    # Calibration rows (routed tokens) of every expert. Checked after each block; the run stops there.
    fail_below_expert_rows: int = Field(default=0, ge=0)
    # Matrices whose second moment could not be factored (quantize/gptq.py). Checked after each block; the run stops.
    max_fallbacks: int = Field(default=0, ge=0)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        """YAML's `true` would count as 1."""
        if isinstance(value, bool):
            raise ValueError("a limit is a number, not true or false")
        return value


def named_limits(fields: dict[str, Any]) -> dict[str, float]:
    """The fields of a recipe or a record that limit something."""
    found = {key: fields[key] for key in Limits.model_fields if fields.get(key) is not None}
    return {key: value for key, value in found.items() if key != "fail_below_expert_rows" or value > 0}

"""Method: how codes are found. A recipe gives one, and quantize/ follows it.

The names of the fields are the recipe's keys.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .scheme import BY_ROW, GRIDS, NF4_BLOCK

MethodName = Literal["rtn", "bnb-nf4", "bnb-int8", "fast", "balanced", "best"]
# Methods that need no calibration.
UNCALIBRATED = ("rtn", *GRIDS)

# The recipe keys that a method sets where the recipe does not name them. docs/benchmarks.md has times and KL of each
# method, and what each key is worth.
PRESETS: dict[str, dict[str, Any]] = {
    # Round-to-nearest with absmax / 8: Meta's own scheme for Scout.
    "rtn": {},
    # The quantizers of bitsandbytes, each with its own format.
    "bnb-nf4": {"format": "bitsandbytes", "bits": 4, "group_size": NF4_BLOCK},
    "bnb-int8": {"format": "bitsandbytes", "bits": 8, "group_size": BY_ROW},
    # GPTQ with statistics taken once for each half of a block, aimed at the reference stream.
    "fast": {
        "sequential": "halves",
        "refine_rounds": 1,
        "tabu_moves": 50,
        "output_blocks": 0,
        "calibration_rows_per_input": 8.0,
    },
    # Statistics site by site, refinement, and Fisher metrics of what output errors cost.
    "balanced": {"refine_rounds": 2, "output_blocks": 8, "token_weighting": "gradient", "tabu_moves": 100},
    # More of each.
    "best": {
        "refine_rounds": 2,
        "output_blocks": 16,
        "token_weighting": "gradient",
        "restarts": 8,
        "tabu_moves": 200,
        "tune_epochs": 4,
    },
}


class Method(BaseModel):
    """How codes are found, from the statistics to the last search."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: MethodName = "best"

    # Search each group's scale (quantize/grid.py).
    scale_search: bool = True
    # With scale_search: allow negative scales.
    signed_scales: bool = True
    # Quantize columns in the order of falling second moment.
    activation_order: bool = True
    # Added to the second moment's diagonal, as a share of its mean.
    damping: float = Field(default=0.01, gt=0, le=1)
    # The layer's pooled moment joins each expert's own with the weight of shrinkage * inputs rows
    # (calibration/moments.py).
    shrinkage: float = Field(default=0.3, gt=0)
    # Rounds after GPTQ of refitting scales and sweeping codes (quantize/refine.py).
    refine_rounds: int = Field(default=2, ge=0)
    # Tries at each stretch of columns; every row keeps its best (quantize/restarts.py).
    restarts: int = Field(default=0, ge=0, le=64)
    # Moves of a tabu search over the codes of each stretch (quantize/tabu.py).
    tabu_moves: int = Field(default=0, ge=0, le=10_000)
    # Blocks of rows between which the cost of output errors is taken into account (quantize/metric.py). 0: every
    # output counts alike.
    output_blocks: int = Field(default=8, ge=0)
    # How much a token counts in the statistics. none: all alike. residual: by 1 / mean square of the residual row that
    # leaves the half block. gradient: by that and the gradients at each site (calibration/sensitivity.py).
    token_weighting: Literal["none", "residual", "gradient"] = "residual"
    # Aim at the reference stream before rounding, with a ridge of strength * inputs / rows (quantize/correction.py).
    reference_correction: bool = True
    correction_strength: float = Field(default=10.0, gt=0)
    # Epochs in which a feed-forward half learns its output by gradients before it is quantized (blocks/tuning.py).
    tune_epochs: int = Field(default=0, ge=0, le=64)
    # Aim what stays in the source's dtype too: routers, and attention that is kept. It costs nothing at run time.
    aim_kept: bool = True
    # sites: statistics anew for every site that reads what others of its half changed. halves: once a half block.
    sequential: Literal["sites", "halves"] = "sites"

    @property
    def needs_statistics(self) -> bool:
        """Whether codes depend on calibration."""
        return self.method not in UNCALIBRATED

    @property
    def output_metric(self) -> bool:
        """Whether the cost of output errors is taken into account."""
        return self.needs_statistics and self.output_blocks > 1

    @property
    def walks_back(self) -> bool:
        """Whether the calibration rows go through the model and back before the first block is quantized."""
        return self.needs_statistics and (self.output_metric or self.token_weighting == "gradient")

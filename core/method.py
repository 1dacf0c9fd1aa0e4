"""Method: how quantization finds the codes. A recipe sets it, and quantize/ follows it.

The fields have the names of the recipe's keys.
"""

from math import ceil
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .scheme import BY_ROW, GRIDS, NF4_BLOCK

MethodName = Literal["rtn", "bnb-nf4", "bnb-int8", "fast", "balanced", "best"]
# Methods that need no calibration.
UNCALIBRATED = ("rtn", *GRIDS)

# Method -> the keys that it sets where the recipe leaves them out. docs/benchmarks.md has the time and the KL of each
# method, and what each key is worth.
PRESETS: dict[str, dict[str, Any]] = {
    # Round to nearest with the scale absmax / 8: Meta's own scheme for Scout.
    "rtn": {},
    # The two quantizers of bitsandbytes, which write its own format.
    "bnb-nf4": {"format": "bitsandbytes", "bits": 4, "group_size": NF4_BLOCK},
    "bnb-int8": {"format": "bitsandbytes", "bits": 8, "group_size": BY_ROW},
    # GPTQ aimed at the reference stream, with statistics taken once for each half of a block.
    "fast": {
        "sequential": "halves",
        "refine_rounds": 1,
        "tabu_moves": 50,
        "output_blocks": 0,
        "calibration_rows_per_input": 8.0,
        "calibration_least_tokens": 20_480,
    },
    # Statistics site by site, more refinement, and a Fisher metric for the cost of output errors.
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
    """Every choice between the statistics and the final codes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    # Sets the keys below that the recipe leaves out (PRESETS).
    method: MethodName = "best"

    # Search each group's scale for the least error, not absmax alone (quantize/grid.py).
    scale_search: bool = True
    # With scale_search: allow negative scales, which give the largest weight the extra level below zero.
    signed_scales: bool = True
    # Quantize the columns with the largest second moment first.
    activation_order: bool = True
    # What is added to the diagonal of the second moment, as a share of the diagonal's mean.
    damping: float = Field(default=0.1, gt=0, le=1)
    # What is added to each entry of that diagonal, as a share of the entry: correlations count less (quantize/gptq.py).
    correlation_damping: float = Field(default=0.1, ge=0, le=1)
    # Each expert's second moment is blended with the layer's pooled one, which counts as shrinkage * inputs rows
    # (calibration/moments.py).
    shrinkage: float = Field(default=0.3, gt=0)
    # Rounds, after GPTQ, that refit the scales and improve the codes (quantize/refine.py).
    refine_rounds: int = Field(default=2, ge=0)
    # Column orders tried for each stretch of columns; every row keeps its best (quantize/restarts.py).
    restarts: int = Field(default=0, ge=0, le=64)
    # Moves of the tabu search over the codes of each stretch (quantize/tabu.py). 0: no search.
    tabu_moves: int = Field(default=0, ge=0, le=10_000)
    # Blocks of output rows that the metric of output errors distinguishes (quantize/metric.py). 0: no metric, all
    # outputs count alike.
    output_blocks: int = Field(default=8, ge=0)
    # How much a token counts in the statistics. none: all alike. residual: 1 / mean square of the residual row that
    # leaves the half of the block. gradient: by that and by the gradients at each site (calibration/sensitivity.py).
    token_weighting: Literal["none", "residual", "gradient"] = "residual"
    # Before rounding, solve the weights for the reference stream's outputs (quantize/correction.py). The ridge is
    # correction_strength * inputs / rows.
    reference_correction: bool = True
    correction_strength: float = Field(default=10.0, gt=0)
    # Epochs of gradient descent in which a feed-forward half learns the original's output before it is quantized
    # (blocks/tuning.py). 0: none.
    tune_epochs: int = Field(default=0, ge=0, le=64)
    # The least number of steps that its epochs have together: where texts are few, a step takes a part of a batch.
    tune_least_steps: int = Field(default=256, ge=1, le=100_000)
    # Solve the weights that stay in the source's dtype too: routers, and attention that is kept. It costs nothing at
    # run time.
    aim_kept: bool = True
    # When statistics are taken. sites: again for every site whose inputs changed. halves: once for each half block.
    sequential: Literal["sites", "halves"] = "sites"

    def tuned_parts(self, batches: float) -> int:
        """Into how many steps tuning cuts a batch, given how many batches an epoch has."""
        return max(1, ceil(self.tune_least_steps / max(1, self.tune_epochs) / max(1.0, batches)))

    @property
    def needs_statistics(self) -> bool:
        """Whether the codes depend on calibration texts."""
        return self.method not in UNCALIBRATED

    @property
    def output_metric(self) -> bool:
        """Whether a metric weighs the outputs' errors (quantize/metric.py)."""
        return self.needs_statistics and self.output_blocks > 1

    @property
    def walks_back(self) -> bool:
        """Whether gradients are needed: one walk through the model and back before the first block is quantized."""
        return self.needs_statistics and (self.output_metric or self.token_weighting == "gradient")

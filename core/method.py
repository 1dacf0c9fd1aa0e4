"""Method: how codes are found. A recipe gives one, and quantize/ follows it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How codes are found. `name` is 'gptq', or what needs no statistics: 'rtn', or a format's own quantizer.
    `output_blocks`: into how many blocks of rows an output metric cuts a matrix; 0 means that every output counts
    alike. `restarts`: tries at each stretch of columns (quantize/restarts.py). `tabu_moves`: codes moved at each
    stretch after that (quantize/tabu.py)."""

    name: str
    scale_search: bool = True
    signed_scales: bool = True
    damping: float = 0.01
    activation_order: bool = True
    refine_rounds: int = 0
    restarts: int = 0
    tabu_moves: int = 0
    output_blocks: int = 0

    @property
    def output_metric(self) -> bool:
        return self.needs_statistics and self.output_blocks > 1

    @property
    def needs_statistics(self) -> bool:
        return self.name == "gptq"

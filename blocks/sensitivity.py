"""Sensitivities of every block on disk: measured once, before the first block is quantized, and read block by block.

One safetensors file a block. A key says what a tensor is and of which site: `metric:SITE` or `weight:SITE`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration.sensitivity import sensitivities
from ..checkpoint import files
from ..checkpoint.model import Model
from ..checkpoint.workdir import Activations, read_tensors
from ..core.method import Method
from ..core.rows import Row, Step
from ..models.walk import Calls

METRIC, WEIGHT = "metric:", "weight:"


@dataclass(frozen=True)
class SensitivityFiles:
    """The files of one run, in a folder of their own; none where the method does not walk back."""

    folder: Path
    method: Method

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:04d}.safetensors"

    def measure(self, model: Model, rows: list[Row], batch_tokens: int, calls: Calls, step: Step) -> None:
        """Walk the original model over the calibration rows, forward and back, and write every block's file."""

        def keep(block: int, metrics: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
            found = {f"{METRIC}{key}": metric for key, metric in metrics.items() if self.method.output_metric}
            if self.method.token_weighting == "gradient":
                found |= {f"{WEIGHT}{key}": weight for key, weight in weights.items()}
            files.write_tensors(self._file(block), found)

        files.make_folder(self.folder)
        store = Activations(self.folder / "acts")
        weighting = self.method.token_weighting
        sensitivities(model.adapter, model.source, rows, batch_tokens, store, calls, keep, step, weighting)

    def read(
        self, block: int, batch_tokens: list[int], device: torch.device
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
        """(metrics [O, O] on `device`, token weights [tokens] batch by batch) by site; empty where the method wants
        none. `batch_tokens`: the tokens of each batch. Raises InputError for a damaged file."""
        if not self.method.walks_back:
            return {}, {}
        found = read_tensors(self._file(block))
        metrics = {key.removeprefix(METRIC): x.to(device) for key, x in found.items() if key.startswith(METRIC)}
        weights = {
            key.removeprefix(WEIGHT): list(x.split(batch_tokens)) for key, x in found.items() if key.startswith(WEIGHT)
        }
        return metrics, weights

"""Sensitivities of every block on disk: measured once, before the first block is quantized, and read block by block.

One safetensors file a block. A key says what a tensor is and of which site: `metric:SITE` or `weight:SITE`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration.sensitivity import Sensitivity, sensitivities
from ..checkpoint import files
from ..checkpoint.activations import Activations
from ..checkpoint.workdir import read_tensors
from ..core.method import Method
from ..core.rows import Row
from ..models.walk import HiddenRows, Walk

METRIC, WEIGHT = "metric:", "weight:"


@dataclass(frozen=True)
class SensitivityFiles:
    """The files of one run, in a folder of their own; none where the method does not walk back."""

    folder: Path
    method: Method

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:04d}.safetensors"

    def measure(self, walk: Walk, rows: list[Row]) -> None:
        """Walk the original model over the calibration rows, forward and back, and write every block's file."""

        def keep(block: int, metrics: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
            found = {f"{METRIC}{key}": metric for key, metric in metrics.items() if self.method.output_metric}
            if self.method.token_weighting == "gradient":
                found |= {f"{WEIGHT}{key}": weight for key, weight in weights.items()}
            files.write_tensors(self._file(block), found)

        files.make_folder(self.folder)
        hidden = walk.hidden_rows(rows, Activations(self.folder / "acts", walk.device))
        sensitivities(hidden, keep, self.method.token_weighting)

    def read(self, block: int, hidden: HiddenRows) -> Sensitivity:
        """One block's, empty where the method wants none. Raises InputError for a damaged file."""
        if not self.method.walks_back:
            return Sensitivity()
        found = read_tensors(self._file(block))
        sizes = [sum(len(hidden.rows[number].tokens) for number in numbers) for numbers in hidden.groups]
        device = hidden.walk.device
        metrics = {key.removeprefix(METRIC): x.to(device) for key, x in found.items() if key.startswith(METRIC)}
        weights = {key.removeprefix(WEIGHT): list(x.split(sizes)) for key, x in found.items() if key.startswith(WEIGHT)}
        return Sensitivity(metrics=metrics, token_weights=weights)

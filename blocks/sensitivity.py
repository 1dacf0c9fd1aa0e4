"""Sensitivities of every block on disk: measured once, before the first block is quantized, and read block by block.

One safetensors file a block. A key says what a tensor is and of which site: `metric:SITE` or `weight:SITE`.
"""

import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration.sensitivity import STREAM, Sensitivity, Stop, sensitivities
from ..checkpoint import files
from ..checkpoint.activations import Activations
from ..checkpoint.workdir import read_tensors
from ..core.method import Method
from ..core.rows import Row
from ..models.walk import HiddenRows, Walk

METRIC, WEIGHT = "metric:", "weight:"
# Where the walk back can go on.
STOP = "stop.safetensors"


@dataclass(frozen=True)
class SensitivityFiles:
    """The files of one run, in a folder of their own; none where the method does not walk back."""

    folder: Path
    method: Method

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:04d}.safetensors"

    def measure(self, walk: Walk, rows: list[Row]) -> None:
        """Walk the original model over the calibration rows, forward and back, and write every block's file. A walk
        that was interrupted goes on from its last stop."""

        def keep(block: int, metrics: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
            found = {f"{METRIC}{key}": metric for key, metric in metrics.items() if self.method.output_metric}
            if self.method.token_weighting == "gradient":
                found |= {f"{WEIGHT}{key}": weight for key, weight in weights.items()}
            files.write_tensors(self._file(block), found)

        def stop(at: Stop) -> None:
            """In the thread that writes: the next stretch goes on meanwhile."""
            wait()
            found = {"begin": torch.tensor(at.begin), "routers": torch.tensor(at.routers)}
            found |= {} if at.routers_HH is None else {"metric": at.routers_HH.cpu()}

            def commit() -> None:
                files.write_tensors(self.folder / STOP, found)
                store.remove_files_above(at.begin)  # what the stop before rested on
                store.remove_files(at.begin, STREAM)

            pending.append(store.keep(*range(at.begin + 1), commit=commit))

        def wait() -> None:
            while pending:
                pending.pop().result()

        pending: list[Future[None]] = []
        acts = self.folder / "acts"
        resumed = self._stop(walk.device)
        if resumed is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        files.make_folder(self.folder)
        store = Activations(acts, walk.device)
        if resumed is not None:
            store.remove_files_above(resumed.begin)  # a kill came before they were removed
        try:
            weighting = self.method.token_weighting
            sensitivities(walk.hidden_rows(rows, store), keep, weighting, stop=stop, resumed=resumed)
            wait()
        finally:
            store.close()
        shutil.rmtree(acts, ignore_errors=True)

    def _stop(self, device: torch.device) -> Stop | None:
        """The last stop of a walk that was begun here."""
        if not (self.folder / STOP).exists():
            return None
        found = read_tensors(self.folder / STOP)
        metric = found["metric"].to(device) if "metric" in found else None
        return Stop(int(found["begin"]), metric, int(found["routers"]))

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

"""The keyword arguments (masks, positions, rotary tables) that a decoder layer is called with.

They are not computed by code of our own. The family's text model makes them: it runs once for each row length, on stub
layers that record their arguments. No key-value cache is used, and no row is padded.
"""

from typing import Any

import torch
from torch import nn

from ..core.device import Compute
from .adapter import Adapter


class _Recorder(nn.Module):
    """Takes the place of a decoder layer and keeps the keyword arguments it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.kwargs = kwargs
        return hidden


class Calls:
    """Keyword arguments by row length and block; they broadcast over the rows of a batch."""

    def __init__(self, adapter: Adapter, compute: Compute) -> None:
        self.adapter, self.compute = adapter, compute
        self._model = adapter.text_skeleton()
        self._recorders = [_Recorder() for _ in range(adapter.n_blocks)]
        self._model.layers = nn.ModuleList(self._recorders)
        self._model.norm = nn.Identity()
        self._known: dict[int, list[dict[str, Any]]] = {}

    def of(self, index: int, tokens: int) -> dict[str, Any]:
        """What block `index` is called with for rows of `tokens` tokens."""
        if tokens not in self._known:
            shape = (1, tokens, self.adapter.hidden_size)
            # Its tables are computed when it is built; on the meta device they have no values. Some rope types change
            # them with the longest row seen so far: each length gets tables of its own.
            rotary = type(self._model.get_submodule("rotary_emb"))
            self._model.rotary_emb = rotary(config=self.adapter.text_config).to(self.compute.device)
            empty = torch.zeros(shape, device=self.compute.device, dtype=self.compute.dtype)
            # Tensors of inference mode could not be used where gradients are computed.
            with torch.inference_mode(False), torch.no_grad():
                self._model(inputs_embeds=empty, use_cache=False)
            self._known[tokens] = [recorder.kwargs for recorder in self._recorders]
        return self._known[tokens][index]

"""Makes transformers load bitsandbytes files of Qwen3-MoE, with one Linear per expert matrix.

transformers 5 keeps the experts of a layer as one 3-D parameter. For bitsandbytes files of Llama 4 it unstacks the
experts itself, so each matrix becomes a Linear4bit. For Qwen3-MoE it does not: it stacks the packed codes as if they
were weights, and then refuses their shapes (4 bits) or loads codes without scales (8 bits). Inside `unstacked_experts`
two of its tables treat Qwen3-MoE like Llama 4. Both tables are restored afterwards, and nothing else is changed.

From transformers 5.23, `quantizers/base.py` and `conversion_mapping.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import conversion_mapping
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP
from transformers.quantizers import base
from transformers.utils.quantization_config import QuantizationMethod

STACKED, MODEL_TYPE = "Qwen3MoeExperts", "qwen3_moe"


class UnstackedExperts(nn.ModuleList):
    """One MLP per expert, in place of Qwen3MoeExperts. transformers builds it with the config as only argument."""

    def __init__(self, config: Any) -> None:
        super().__init__(Qwen3MoeMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))

    def forward(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts' outputs [T, H]; T tokens, K top-k, H hidden size."""
        out_TH = torch.zeros_like(x_TH)
        for number in experts_TK.unique().tolist():
            token, choice = (experts_TK == number).nonzero(as_tuple=True)
            out_TH.index_add_(0, token, self[number](x_TH[token]) * weights_TK[token, choice, None].to(x_TH.dtype))
        return out_TH


@contextmanager
def unstacked_experts() -> Iterator[None]:
    """While open, transformers loads every expert of a Qwen3-MoE file of bitsandbytes as it is stored."""
    patched = base.MODULES_TO_PATCH_FOR_QUANTIZATION
    stacking = conversion_mapping.get_checkpoint_conversion_mapping(MODEL_TYPE)
    patched[STACKED] = {
        "module_name": UnstackedExperts,
        "quantization_methods": [QuantizationMethod.BITS_AND_BYTES],
    }
    conversion_mapping.register_checkpoint_conversion_mapping(MODEL_TYPE, [], overwrite=True)
    try:
        yield
    finally:
        del patched[STACKED]
        conversion_mapping.register_checkpoint_conversion_mapping(MODEL_TYPE, stacking, overwrite=True)

"""Root-mean-square norms as one kernel on a GPU.

transformers writes them as seven operations, each of which passes over the rows. torch has one kernel for all of them
(`rms_norm`), which computes in fp32 and rounds to the rows' dtype in the same place; the weight is multiplied
afterwards, as there. A CPU keeps transformers' own.
"""

import torch.nn.functional as F
from torch import Tensor, nn

# A norm's class -> where it keeps its epsilon. All are x / sqrt(mean(x^2) + epsilon), rounded, times the weight if
# there is one.
EPSILON = {
    "DeepseekV3RMSNorm": "variance_epsilon",
    "Llama4TextL2Norm": "eps",
    "Llama4TextRMSNorm": "eps",
    "MixtralRMSNorm": "variance_epsilon",
    "Qwen3MoeRMSNorm": "variance_epsilon",
}


def fuse_norms(layer: nn.Module) -> None:
    """From now on the norms of `layer` are computed by `rms_norm`."""
    for module in layer.modules():
        name = type(module).__name__
        if name in EPSILON:
            module.__class__ = _fused(type(module), EPSILON[name])


def _fused(norm: type[nn.Module], epsilon: str) -> type[nn.Module]:
    class Fused(norm):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> Tensor:
            out = F.rms_norm(x, x.shape[-1:], None, getattr(self, epsilon))
            weight = getattr(self, "weight", None)
            return out if weight is None else out * weight

    return Fused

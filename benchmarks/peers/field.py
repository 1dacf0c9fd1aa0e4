"""Every peer of the comparison: environment, script, group sizes and options. A peer and a group size make a row."""

from dataclasses import dataclass, field
from typing import Any

# onecard's own rows: values of the recipe's `method`.
OWN = ("best", "balanced", "fast")
OWN_GROUPS = (128, 64, 32)
# Family -> the roles that become int4. Ours knows no dense Llama; other tools have that form of real.py's model.
ROLES = {
    "llama4": ["expert", "shared_expert", "attention"],
    "qwen3_moe": ["expert", "mlp", "attention"],
    "mixtral": ["expert", "attention"],
    "llama": [],
}


@dataclass(frozen=True)
class Peer:
    """`environment`: a file of requirements/, or "onecard" for this interpreter. `rescales`: the peer moves scale
    between matrices; a weight is then compared up to one factor a row and one a column. `check_only`: run only if
    named."""

    name: str
    environment: str
    script: str
    groups: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    rescales: bool = False
    calibrated: bool = True
    check_only: bool = False


def own(method: str) -> Peer:
    return Peer(f"onecard-{method}", "onecard", "with_onecard.py", OWN_GROUPS, {"method": method})


def attention_kept(method: str) -> Peer:
    """Attention kept in bf16, as in the Scout recipe, to compare with Q4_K_M, which is not all four bits either."""
    options = {"method": method, "quantize_roles": ["expert", "shared_expert", "mlp"]}
    return Peer(f"onecard-{method}-bf16-attention", "onecard", "with_onecard.py", (32,), options)


LLM_COMPRESSOR, LLAMA_CPP = "with_llmcompressor.py", "with_llamacpp.py"
GPTQ, AWQ = {"method": "gptq"}, {"method": "awq"}

PEERS = (
    *(own(method) for method in OWN),
    *(attention_kept(method) for method in OWN),
    # Meta's scheme for Scout: round-to-nearest, symmetric, scale = absmax / 8.
    Peer("rtn-absmax8", "onecard", "with_onecard.py", (128, 64, 32), {"method": "rtn"}, calibrated=False),
    Peer("llmcompressor-gptq", "llmcompressor", LLM_COMPRESSOR, (128, 64, 32), GPTQ | {"all_experts": False}),
    Peer("llmcompressor-gptq-all-experts", "llmcompressor", LLM_COMPRESSOR, (128,), GPTQ | {"all_experts": True}),
    Peer("llmcompressor-awq", "llmcompressor", LLM_COMPRESSOR, (128, 32), AWQ | {"all_experts": False}, rescales=True),
    Peer("gptqmodel", "gptqmodel", "with_gptqmodel.py", (128, 32)),
    Peer("auto-gptq", "autogptq", "with_autogptq.py", (128, 32)),
    Peer("auto-round", "autoround", "with_autoround.py", (128, 64, 32)),
    Peer("hqq", "hqq", "with_hqq.py", (128, 64, 32), calibrated=False),
    Peer("bitsandbytes-nf4", "bitsandbytes", "with_bitsandbytes.py", (64,), calibrated=False),
    Peer("torchao-int4", "torchao", "with_torchao.py", (128, 32), calibrated=False),
    Peer("llamacpp-q4_0", "llamacpp", LLAMA_CPP, (32,), {"type": "Q4_0"}, calibrated=False),
    Peer("llamacpp-q4_0-imatrix", "llamacpp", LLAMA_CPP, (32,), {"type": "Q4_0", "imatrix": True}),
    Peer("llamacpp-q4_k_m", "llamacpp", LLAMA_CPP, (32,), {"type": "Q4_K_M"}, calibrated=False),
    Peer("llamacpp-q4_k_m-imatrix", "llamacpp", LLAMA_CPP, (32,), {"type": "Q4_K_M", "imatrix": True}),
    # llama-quantize's default: the token embedding and the head are quantized too.
    Peer("llamacpp-q4_0-default", "llamacpp", LLAMA_CPP, (32,), {"type": "Q4_0", "default": True}, calibrated=False),
    Peer(
        "llamacpp-q4_k_m-imatrix-default",
        "llamacpp",
        LLAMA_CPP,
        (32,),
        {"type": "Q4_K_M", "imatrix": True, "default": True},
    ),
    # No quantization: checks that conversion and reading back keep every bit. Runs only if named.
    Peer("llamacpp-bf16", "llamacpp", LLAMA_CPP, (32,), {"type": "BF16"}, calibrated=False, check_only=True),
)

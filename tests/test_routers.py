"""Router logits are fp32 in every family, whatever the walk's dtype: routes are those of an exact product of the rows.

The judge is the product in fp64 of the rows that the router gets with the weight as it is stored, and the family's own
ranking of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from babies import shard_files
from onecard.checkpoint.model import open_model
from onecard.models.adapter import Half
from walking import cpu_walk

FAMILIES = ("scout", "maverick", "llama4-text", "qwen3", "deepseek", "mixtral")
TOKENS = 2048


def store_routers(model: Path, dtype: torch.dtype) -> None:
    """Every router of the folder stored in this dtype, with values that bf16 cannot hold."""
    (shard,) = shard_files(model)
    tensors = load_file(shard)
    for name in [
        n for n in tensors if n.endswith((".router.weight", ".mlp.gate.weight", ".block_sparse_moe.gate.weight"))
    ]:
        tensors[name] = (tensors[name].to(dtype) * 1.0033).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_walk_routes_by_logits_that_were_never_rounded(
    copied: Callable[..., Path], family: str, stored: torch.dtype
) -> None:
    folder = copied(family)
    store_routers(folder, stored)
    model = open_model(str(folder))
    adapter = model.adapter
    (index,) = [block for block in range(2) if adapter.is_moe(block)][-1:]
    walk = cpu_walk(model, dtype=torch.bfloat16)
    block = walk.load(index)
    read: list[torch.Tensor] = []

    def keep(_module: Any, args: Any) -> None:
        read.append(args[0].flatten(0, -2))

    handle = block.layer.get_submodule(adapter.half_modules[Half.FEED_FORWARD]).register_forward_pre_hook(keep)
    hidden = torch.randn(TOKENS // 64, 64, adapter.hidden_size, generator=torch.Generator().manual_seed(0))
    routes = block.routed(hidden.to(torch.bfloat16)).routes_TK
    handle.remove()
    (rows,) = read
    assert rows.dtype == torch.bfloat16
    router = adapter.router_site(index)
    assert router is not None
    weight = walk.read(f"{router.first_module}.weight")
    assert weight.dtype == stored
    ranks = adapter.ranking(block.layer, rows.double() @ weight.double().T)
    assert routes is not None
    assert torch.equal(routes, ranks.topk(adapter.top_k, dim=-1).indices.sort(-1).values)

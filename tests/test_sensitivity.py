"""The metrics of calibration/sensitivity.py against gradients of the whole model as transformers computes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration

from onecard.calibration.sensitivity import NEAR_SHARE, RESIDUAL, sensitivities
from onecard.checkpoint.workdir import Activations
from onecard.core.rows import Row
from onecard.models.adapter import Half
from onecard.models.walk import Calls
from onecard.prepare import open_model

CPU = torch.device("cpu")


class Silence:
    def begin(self, stage: str, block: int | None = None) -> None: ...

    def advance(self, tokens: int) -> None: ...


def tie_twin(x_TH: torch.Tensor, w_EH: torch.Tensor, gain_H: torch.Tensor, family: str) -> torch.Tensor:
    """One token after the other, in fp64."""
    top_k = 1 if family == "scout" else 2
    logits = x_TH @ w_EH.double().T
    order = logits.sort(dim=-1, descending=True)
    margins = order.values[:, top_k - 1] - order.values[:, top_k]
    near = margins.sort().values[max(1, int(NEAR_SHARE * len(margins))) - 1]
    total = torch.zeros(x_TH.shape[1], x_TH.shape[1], dtype=torch.float64)
    for margin, experts in zip(margins, order.indices, strict=True):
        d = (w_EH[experts[top_k - 1]] - w_EH[experts[top_k]]).double() * gain_H.double()
        total += torch.exp(-(margin**2) / (2 * near**2)) * torch.outer(d, d)
    return total * (len(total) / total.trace())


def by_transformers(folder: Path, family: str, ids_NT: torch.Tensor, seed: int) -> dict[tuple[int, str], torch.Tensor]:
    """Block and site -> E[g g^T] over all tokens, scaled by the mean square of what leaves the half, trace O; and for
    what reaches the residual stream, the mean over later routers of the near ties' metric, trace H."""
    cls: Any = Llama4ForConditionalGeneration if family == "scout" else AutoModelForCausalLM
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    layers = next(m for n, m in model.named_modules() if n.endswith("layers") and "vision" not in n)
    kept: dict[tuple[int, str], torch.Tensor] = {}

    def keep(block: int, name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, out: Any) -> None:
            value = args[0] if name == "middle" else out[0] if isinstance(out, tuple) else out
            value.retain_grad()
            kept[block, name] = value
            if name == "middle":
                kept[block, "normed"] = out

        return hook

    for block, layer in enumerate(layers):
        layer.register_forward_hook(keep(block, RESIDUAL))
        layer.post_attention_layernorm.register_forward_hook(keep(block, "middle"))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).register_forward_hook(keep(block, name))
    logits = model(input_ids=ids_NT, use_cache=False).logits.flatten(0, 1)
    p = torch.softmax(logits.detach(), dim=-1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    logits.log_softmax(-1).gather(1, drawn[:, None]).sum().backward()
    ties = {}
    for block, layer in enumerate(layers):
        router = getattr(
            getattr(layer, "feed_forward", None) or layer.mlp, "router" if family == "scout" else "gate", None
        )
        if router is not None:
            normed = kept[block, "normed"].detach().flatten(0, 1).double()
            ties[block] = tie_twin(
                normed, router.weight.detach(), layer.post_attention_layernorm.weight.detach(), family
            )
    found = {}
    for block in range(len(layers)):
        ms = {n: kept[block, n].detach().flatten(0, 1).square().mean(-1).sqrt()[:, None] for n in (RESIDUAL, "middle")}

        def outer(names: list[str], scale: torch.Tensor, block: int = block) -> torch.Tensor:
            grads = [kept[block, n].grad.flatten(0, 1) for n in names]
            g = torch.cat(grads, dim=-1).double() * scale
            total = g.T @ g
            return total * (len(total) / total.trace())

        def routers(first: int) -> torch.Tensor | float:
            later = [metric for index, metric in ties.items() if index >= first]
            return torch.stack(later).mean(0) if later else 0.0

        found[block, RESIDUAL] = outer([RESIDUAL], ms[RESIDUAL]) + routers(block + 1)
        found[block, "self_attn.o"] = outer(["o_proj"], ms["middle"]) + routers(block)
        found[block, "self_attn.qkv"] = outer(["q_proj", "k_proj", "v_proj"], ms["middle"])
    return found


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_metrics_are_those_of_the_whole_model(family: str, baby: Callable[..., Path], tmp_path: Path) -> None:
    folder = baby(family)
    model = open_model(str(folder))
    ids = torch.randint(3, 240, (3, 21), generator=torch.Generator().manual_seed(5))
    rows = [Row(f"row-{i}", "text", tokens) for i, tokens in enumerate(ids)]
    found: dict[int, dict[str, torch.Tensor]] = {}
    store = Activations(tmp_path / "acts")
    calls = Calls(model.adapter, CPU, torch.float32)
    sensitivities(
        model.adapter, model.source, rows, 1000, store, calls, lambda b, m: found.__setitem__(b, m), Silence(), seed=9
    )
    expected = by_transformers(folder, family, ids, seed=9)
    for (block, key), metric in expected.items():
        torch.testing.assert_close(found[block][key].double(), metric, rtol=2e-3, atol=2e-3)
    assert not list((tmp_path / "acts").rglob("*.safetensors")), "the store is left empty"


def test_batches_do_not_matter(baby: Callable[..., Path], tmp_path: Path) -> None:
    model = open_model(str(baby("scout")))
    ids = torch.randint(3, 240, (4, 13), generator=torch.Generator().manual_seed(6))
    rows = [Row(f"row-{i}", "text", tokens) for i, tokens in enumerate(ids)]
    runs = []
    for batch_tokens in (26, 1000):
        found: dict[int, dict[str, torch.Tensor]] = {}
        sensitivities(
            model.adapter, model.source, rows, batch_tokens, Activations(tmp_path / str(batch_tokens)),
            Calls(model.adapter, CPU, torch.float32), lambda b, m, found=found: found.__setitem__(b, m), Silence(),
        )  # fmt: skip
        runs.append(found)
    for block, metrics in runs[0].items():
        for key, metric in metrics.items():
            parts = metric.trace() / len(metric)
            assert any(parts == pytest.approx(whole, rel=1e-5) for whole in (1, 2)), "its own, and the routers'"
            torch.testing.assert_close(metric, metric.T)
            torch.testing.assert_close(metric, runs[1][block][key], rtol=5e-2, atol=5e-2)


def test_the_two_halves_are_the_block(baby: Callable[..., Path]) -> None:
    from onecard.models.walk import load_block, only, run_block

    for family in ("scout", "maverick", "qwen3"):
        model = open_model(str(baby(family)))
        hidden = torch.randn(2, 9, model.adapter.hidden_size, generator=torch.Generator().manual_seed(1))
        calls = Calls(model.adapter, CPU, torch.float32).of(9)
        for index in range(model.adapter.n_blocks):
            block = load_block(model.adapter, model.source, index, CPU, torch.float32)
            whole = run_block(block, hidden, calls[index])
            halves = hidden
            for half in Half:
                with only(model.adapter, block, half):
                    halves = run_block(block, halves, calls[index])
            assert torch.equal(whole, halves)

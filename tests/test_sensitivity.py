"""The metrics of calibration/sensitivity.py against gradients of the whole model as transformers computes it."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration

from babies import changed_copy, edit_json
from onecard.blocks import sensitivity as sensitivity_files
from onecard.blocks.sensitivity import STOP, SensitivityFiles
from onecard.calibration.sensitivity import NEAR_SHARE, RESIDUAL, near_ties, sensitivities, tie_metric
from onecard.checkpoint import activations
from onecard.checkpoint.activations import Activations
from onecard.checkpoint.model import open_model
from onecard.core.rows import Row, rows_at_once
from onecard.models.adapter import Half
from onecard.models.block import Block, Passed
from onecard.models.walk import Walk
from onecard.recipe import load_recipe
from walking import cpu_walk

CPU = torch.device("cpu")


def ranks_twin(logits_E: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3's ranks: sigmoid plus bias, only in the two groups of two experts with the largest sums."""
    ranks = (1 / (1 + (-logits_E).exp()) + bias_E.double()).tolist()
    sums = sorted((-ranks[2 * g] - ranks[2 * g + 1], g) for g in range(4))
    chosen = {g for _, g in sums[:2]}
    return torch.tensor([rank if e // 2 in chosen else -torch.inf for e, rank in enumerate(ranks)], dtype=torch.float64)


def tie_twin(x_TH: torch.Tensor, router: Any, gain_H: torch.Tensor, family: str) -> torch.Tensor:
    """The near ties' metric, one token after the other in fp64."""
    top_k = 1 if family == "scout" else 2
    w_EH = router.weight.detach()
    logits = x_TH @ w_EH.double().T
    ranks, slopes = logits, torch.ones_like(logits)
    if family == "deepseek":
        ranks = torch.stack([ranks_twin(row, router.e_score_correction_bias) for row in logits])
        slopes = logits.sigmoid() * (1 - logits.sigmoid())
    order = ranks.sort(dim=-1, descending=True)
    margins = order.values[:, top_k - 1] - order.values[:, top_k]
    near = margins.sort().values[max(1, int(NEAR_SHARE * len(margins))) - 1]
    total = torch.zeros(x_TH.shape[1], x_TH.shape[1], dtype=torch.float64)
    for margin, slope, experts in zip(margins, slopes, order.indices, strict=True):
        taken, left = experts[top_k - 1], experts[top_k]
        d = (slope[taken] * w_EH[taken] - slope[left] * w_EH[left]) * gain_H.double()
        total += torch.exp(-(margin**2) / (2 * near**2)) * torch.outer(d, d)
    return total * (len(total) / total.trace())


GROUPED = {n: f"{n}_proj" for n in "qkvo"}
ATTENTION = {
    "deepseek": {"q_a": "q_a_proj", "kv_a": "kv_a_proj_with_mqa", "q_b": "q_b_proj", "kv_b": "kv_b_proj", "o": "o_proj"}
}
Found = dict[tuple[int, str], torch.Tensor]


def by_transformers(folder: Path, family: str, ids_NT: torch.Tensor, seed: int, weighting: str) -> tuple[Found, Found]:
    """(block, site) -> E[g g^T] weighted by token, with trace O; sites that reach the residual stream also add the mean
    of later routers' near-tie metrics, trace H. The second value is the token weights [tokens]."""
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
        for name in ATTENTION.get(family, GROUPED).values():
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
            ties[block] = tie_twin(normed, router, layer.post_attention_layernorm.weight.detach(), family)
    found, weights = {}, {}
    for block in range(len(layers)):
        sites = {f"self_attn.{key}": name for key, name in ATTENTION.get(family, GROUPED).items()}
        for key, name in {RESIDUAL: RESIDUAL, **sites}.items():
            left = kept[block, RESIDUAL if name == RESIDUAL else "middle"]
            root_mean_square = left.detach().flatten(0, 1).double().square().mean(-1).sqrt()
            gradients = kept[block, name].grad
            assert gradients is not None
            g = gradients.flatten(0, -2).double()
            size = g.norm(dim=-1)
            match weighting:
                case "residual":
                    weights[block, key] = root_mean_square**-2
                case "gradient":
                    weights[block, key] = (size**3 / root_mean_square).sqrt()
                case _:
                    weights[block, key] = torch.ones_like(size)
            total = sum(torch.outer(g_O, g_O) / w for g_O, w in zip(g, weights[block, key], strict=True) if w > 0)
            found[block, key] = total * (len(total) / total.trace())
            first = {RESIDUAL: block + 1, "self_attn.o": block}.get(key, len(layers))
            later = [metric for index, metric in ties.items() if index >= first]
            if later:
                found[block, key] += torch.stack(later).mean(0)
    return found, weights


def walked(
    folder: Path, ids_NT: torch.Tensor, acts: Path, batch_tokens: int, weighting: str, seed: int = 0
) -> tuple[Found, Found]:
    model = open_model(str(folder))
    rows = [Row(f"row-{i}", "text", tokens) for i, tokens in enumerate(ids_NT)]
    metrics: Found = {}
    weights: Found = {}

    def keep(block: int, some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
        metrics.update({(block, key): metric for key, metric in some.items()})
        weights.update({(block, key): weight for key, weight in others.items()})

    sensitivities(cpu_walk(model, batch_tokens).hidden_rows(rows, Activations(acts)), keep, weighting, seed)
    assert not list(acts.rglob("*.safetensors")), "the store is left empty"
    return metrics, weights


@pytest.mark.parametrize("weighting", ["none", "residual", "gradient"])
@pytest.mark.parametrize("family", ["scout", "qwen3", "deepseek", "mixtral"])
def test_metrics_and_weights_are_those_of_the_whole_model(
    family: str, weighting: str, baby: Callable[..., Path], tmp_path: Path
) -> None:
    folder = baby(family)
    ids = torch.randint(3, 240, (3, 21), generator=torch.Generator().manual_seed(5))
    metrics, weights = walked(folder, ids, tmp_path / "acts", 1000, weighting, seed=9)
    expected_metrics, expected_weights = by_transformers(folder, family, ids, 9, weighting)
    assert metrics.keys() == expected_metrics.keys() == weights.keys()
    for place, metric in expected_metrics.items():
        torch.testing.assert_close(metrics[place].double(), metric, rtol=2e-3, atol=2e-3)
        largest = expected_weights[place].max()
        torch.testing.assert_close(
            weights[place].double() / largest, expected_weights[place] / largest, rtol=1e-3, atol=1e-5
        )


def test_batches_do_not_matter(baby: Callable[..., Path], tmp_path: Path) -> None:
    ids = torch.randint(3, 240, (4, 13), generator=torch.Generator().manual_seed(6))
    (some, some_weights), (whole, whole_weights) = (
        walked(baby("scout"), ids, tmp_path / str(batch_tokens), batch_tokens, "gradient")
        for batch_tokens in (26, 1000)
    )
    for place, metric in some.items():
        parts = metric.trace() / len(metric)
        assert any(parts == pytest.approx(whole, rel=1e-5) for whole in (1, 2)), "its own, and the routers'"
        torch.testing.assert_close(metric, metric.T)
        torch.testing.assert_close(metric, whole[place], rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(some_weights[place], whole_weights[place], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4, 7, 16, 48, 94])
def test_the_walk_back_needs_far_fewer_places_than_blocks(
    n_blocks: int, baby: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk goes back through every block once, with the rows that enter it, whatever the spacing."""
    model = open_model(str(baby("scout")))
    held: set[tuple[int, str]] = set()
    most = 0

    class Store:
        def put(self, block: int, stream: str, batch: int, hidden: torch.Tensor) -> None:
            nonlocal most
            held.add((block, stream))
            most = max(most, len(held))

        def get(self, block: int, stream: str, batch: int) -> torch.Tensor:
            assert (block, stream) in held
            return torch.zeros(1, 3, model.adapter.hidden_size)

        def drop(self, block: int, stream: str | None = None) -> None:
            for place in [place for place in held if place[0] == block and stream in (None, place[1])]:
                held.discard(place)

        def release(self, block: int, stream: str | None = None) -> None:
            """On the disk it stays."""

    gone: list[int] = []
    walk, first = cpu_walk(model, 10), cpu_walk(model, 10).load(0)

    class Again(Block):
        """The baby's first block, under another number."""

        def forward(self, hidden_NTH: torch.Tensor, half: Half | None = None) -> torch.Tensor:
            return first.forward(hidden_NTH, half)

        def differentiable(self, hidden_NTH: torch.Tensor, half: Half | None = None) -> Passed:
            gone.append(self.index)
            return first.differentiable(hidden_NTH, half)

    class Deep(Walk):
        def load(self, index: int) -> Block:
            return Again(self.adapter, index, first.layer, first.calls)

    sites, prefix = model.adapter.sites(0), model.adapter.block_prefix(0)
    monkeypatch.setattr(model.adapter, "n_blocks", n_blocks)
    monkeypatch.setattr(model.adapter, "sites", lambda _: sites)
    monkeypatch.setattr(model.adapter, "block_prefix", lambda _: prefix)
    deep = Deep(adapter=walk.adapter, source=walk.source, compute=walk.compute, step=walk.step, calls=walk.calls)
    rows = deep.hidden_rows([Row("r", "text", torch.tensor([5, 6, 7]))], Store())
    sensitivities(rows, lambda *_: None, "residual")
    assert gone == list(reversed(range(n_blocks)))
    assert not held
    assert most <= rows_at_once(n_blocks) <= 3 * n_blocks**0.5 + 3


def test_a_walk_back_goes_on_where_it_was_stopped(
    baby: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every stop: the files of all blocks are those of a walk that was not stopped, and nothing is left beside."""
    method = load_recipe("demo").quantizer
    ids = torch.randint(3, 240, (3, 21), generator=torch.Generator().manual_seed(5))
    rows = [Row(f"row-{i}", "text", tokens) for i, tokens in enumerate(ids)]
    walk = cpu_walk(open_model(str(baby("scout"))), 30)

    def contents(folder: Path) -> dict[str, bytes]:
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert not [name for name in found if name.startswith("acts")]
        return {name: data for name, data in found.items() if name != STOP}

    SensitivityFiles(tmp_path / "whole", method).measure(walk, rows)
    whole = contents(tmp_path / "whole")
    assert len(whole) == walk.adapter.n_blocks
    real, seen = sensitivity_files.files.write_tensors, []
    for stops in range(walk.adapter.n_blocks + 1):
        seen.clear()

        def stopping(path: Path, *args: object, last: int = stops, **kwargs: object) -> None:
            real(path, *args, **kwargs)  # type: ignore[arg-type]
            seen.extend([path] if path.name == STOP else [])
            if len(seen) > last:
                raise KeyboardInterrupt

        made = SensitivityFiles(tmp_path / f"{stops}", method)
        with monkeypatch.context() as patch:
            patch.setattr(sensitivity_files.files, "write_tensors", stopping)
            with pytest.raises(KeyboardInterrupt):
                made.measure(walk, rows)
        made.measure(walk, rows)
        assert contents(tmp_path / f"{stops}") == whole


def test_a_slow_disk_does_not_stop_the_walk_back(
    baby: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread still writes what a stop rests on while the walk lets go of those rows: a stretch of two blocks."""
    method, walk = load_recipe("demo").quantizer, cpu_walk(open_model(str(baby("scout"))), 30)
    ids = torch.randint(3, 240, (3, 21), generator=torch.Generator().manual_seed(5))
    rows = [Row(f"row-{i}", "text", tokens) for i, tokens in enumerate(ids)]
    monkeypatch.setattr("onecard.calibration.sensitivity.spacing", lambda _: 2)
    real, let_go = activations.files.write_tensors, threading.Event()

    def slowly(path: Path, *args: object, **kwargs: object) -> None:
        assert path.parent.name != "0001" or let_go.wait(60)
        real(path, *args, **kwargs)  # type: ignore[arg-type]

    def told(name: str) -> Callable[..., None]:
        method = getattr(Activations, name)

        def tell(store: Activations, block: int, stream: str | None = None) -> None:
            method(store, block, stream)
            if block == 1:
                let_go.set()

        return tell

    SensitivityFiles(tmp_path / "quick", method).measure(walk, rows)
    monkeypatch.setattr(activations.files, "write_tensors", slowly)
    for name in ("drop", "release"):
        monkeypatch.setattr(Activations, name, told(name))
    SensitivityFiles(tmp_path / "slow", method).measure(walk, rows)
    names = sorted(path.name for path in (tmp_path / "quick").iterdir())
    assert names == ["0000.safetensors", "0001.safetensors", STOP]
    assert names == sorted(path.name for path in (tmp_path / "slow").iterdir())
    for name in names:
        assert (tmp_path / "quick" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes()


def test_the_two_halves_are_the_block(baby: Callable[..., Path]) -> None:
    for family in ("scout", "maverick", "qwen3", "deepseek", "mixtral"):
        model = open_model(str(baby(family)))
        hidden = torch.randn(2, 9, model.adapter.hidden_size, generator=torch.Generator().manual_seed(1))
        walk = cpu_walk(model)
        for index in range(model.adapter.n_blocks):
            block = walk.load(index)
            whole = block.forward(hidden)
            halves = hidden
            for half in Half:
                halves = block.forward(halves, half)
            assert torch.equal(whole, halves)


def zeros(router: torch.Tensor) -> torch.Tensor:
    return router * 0


def in_pairs(router: torch.Tensor) -> torch.Tensor:
    """Each expert's row twice, as in a model whose experts were copied."""
    return router[: len(router) // 2].repeat_interleave(2, 0)


@pytest.mark.parametrize("change", [zeros, in_pairs])
def test_a_router_whose_tied_rows_are_alike_has_no_ties_to_move(
    change: Callable[[torch.Tensor], torch.Tensor], baby: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts tie exactly: the walk back must not divide by nothing and call the model broken."""
    model = changed_copy(
        baby("qwen3"), tmp_path / "ties", lambda n, t: change(t) if n.endswith("mlp.gate.weight") else t
    )
    opened = open_model(str(model))
    block = cpu_walk(opened).load(0)
    hidden = opened.adapter.hidden_size
    weight = block.weight(opened.adapter.router_site(0).first_module)
    assert torch.equal(weight[0], weight[1])
    pair = torch.tensor([[0, 1], [3, 2], [0, 1]])
    ties = [(torch.zeros(3), pair, torch.ones(3, 2))]
    assert torch.equal(tie_metric(block, ties), torch.zeros(hidden, hidden))
    rows = torch.randn(2, 7, hidden, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(tie_metric(block, near_ties(block, rows))).all()


def test_tokens_without_a_second_choice_make_no_ties(baby: Callable[..., Path], tmp_path: Path) -> None:
    """Two open experts, of which a token takes three: the third and the fourth are both out of reach."""
    model = Path(shutil.copytree(baby("deepseek"), tmp_path / "few"))
    edit_json(model / "config.json", lambda c: c.update(num_experts_per_tok=3, topk_group=1))
    opened = open_model(str(model))
    rows = torch.randn(2, 7, opened.adapter.hidden_size, generator=torch.Generator().manual_seed(0))
    assert near_ties(cpu_walk(opened).load(1), rows) == []

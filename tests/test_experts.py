"""Experts and adapters: what an expert computes, and each adapter's names, shapes, roles and units.

RoutedExperts is held against one token and one chosen expert at a time, in fp64. Adapters are held against tables
written by hand from the families' published layouts, and against plain slices of the fused tensors.
"""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import babies
from onecard.checkpoint.source import open_folder
from onecard.models.adapter import QUANTIZABLE, Adapter, Role, read
from onecard.models.experts import RoutedExperts
from onecard.models.families import load_adapter

EXPERTS, HIDDEN, WIDTH = 7, 12, 20


def make_experts(scale_input: bool, seed: int = 0) -> RoutedExperts:
    torch.manual_seed(seed)
    experts = RoutedExperts(EXPERTS, HIDDEN, WIDTH, scale_input).double()
    experts.gate_up.data = torch.randn_like(experts.gate_up)
    experts.down.data = torch.randn_like(experts.down)
    return experts


def route(tokens: int, top_k: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, chosen experts, weights); a token never chooses an expert twice."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])
    return x, chosen, torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)


def one_by_one(
    experts: RoutedExperts, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, scale_input: bool
) -> torch.Tensor:
    """The obvious computation: every token, every chosen expert, gate the first half of gate_up."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(chosen.shape[1]):
            e, weight = int(chosen[t, k]), weights[t, k]
            seen = x[t] * weight if scale_input else x[t]
            gate, up = experts.gate_up[e, :WIDTH] @ seen, experts.gate_up[e, WIDTH:] @ seen
            y = experts.down[e] @ (gate / (1 + torch.exp(-gate)) * up)
            out[t] += y if scale_input else weight * y
    return out


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("scale_input", [True, False])
def test_equals_one_token_and_one_expert_at_a_time(scale_input: bool, top_k: int) -> None:
    experts, (x, chosen, weights) = make_experts(scale_input), route(40, top_k)
    torch.testing.assert_close(
        experts(x, chosen, weights), one_by_one(experts, x, chosen, weights, scale_input), rtol=1e-12, atol=1e-12
    )


def test_scaling_the_input_is_another_function_than_scaling_the_output() -> None:
    """SwiGLU is not homogeneous: scaling the input and scaling the output differ, and a mix-up must not pass."""
    x, chosen, weights = route(40, 1)
    by_input, by_output = make_experts(True)(x, chosen, weights), make_experts(False)(x, chosen, weights)
    assert float((by_input - by_output).norm() / by_input.norm()) > 0.1


@pytest.mark.parametrize("scale_input", [True, False])
def test_each_expert_sees_its_own_rows_as_they_enter_its_weights(scale_input: bool) -> None:
    experts, (x, chosen, weights) = make_experts(scale_input), route(50, 2)
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def observe(name: str, expert: int, tokens: torch.Tensor, rows: torch.Tensor, after: torch.Tensor | None) -> None:
        assert (name, expert) not in seen, "one call an expert"
        assert tokens.tolist() == [t for t in range(50) if expert in chosen[t]], "token numbers, rising"
        slots = [weights[t, k] for t in range(50) for k in range(2) if chosen[t, k] == expert]
        assert after is None if scale_input else torch.equal(after[:, 0], torch.stack(slots)), "what the router gave"
        seen[name, expert] = rows.clone()

    experts.observer = observe
    experts(x, chosen, weights)
    for e in range(EXPERTS):
        mine = [(t, k) for t in range(50) for k in range(2) if chosen[t, k] == e]
        entering = torch.stack([x[t] * (weights[t, k] if scale_input else 1) for t, k in mine])
        torch.testing.assert_close(seen["gate_up", e], entering)
        gate, up = entering @ experts.gate_up[e, :WIDTH].T, entering @ experts.gate_up[e, WIDTH:].T
        torch.testing.assert_close(seen["down", e], gate * torch.sigmoid(gate) * up)
    for name in ("gate_up", "down"):
        assert sum(len(rows) for (n, _), rows in seen.items() if n == name) == 50 * 2


@pytest.mark.parametrize("top_k", [1, 2])
def test_work_is_tokens_times_top_k(top_k: int) -> None:
    experts, (x, chosen, weights) = make_experts(True), route(64, top_k)
    with FlopCounterMode(display=False) as counter:
        experts(x, chosen, weights)
    assert counter.get_total_flops() == 2 * 64 * top_k * (HIDDEN * 2 * WIDTH + WIDTH * HIDDEN)


@pytest.mark.parametrize("scale_input", [True, False])
def test_experts_without_tokens_do_nothing(scale_input: bool) -> None:
    experts, (x, _, weights) = make_experts(scale_input), route(9, 1)
    called: list[int] = []
    experts.observer = lambda name, expert, *_: called.append(expert)
    chosen = torch.full((9, 1), EXPERTS - 2)
    experts.gate_up.data[: EXPERTS - 2] = torch.nan  # reading any other expert gives NaN
    torch.testing.assert_close(
        experts(x, chosen, weights), one_by_one(experts, x, chosen, weights, scale_input), rtol=1e-12, atol=1e-12
    )
    assert called == [EXPERTS - 2] * 2


def test_equal_inputs_give_equal_bits() -> None:
    experts, (x, chosen, weights) = make_experts(False).float(), route(300, 3)
    first = experts(x.float(), chosen, weights.float())
    assert all(torch.equal(experts(x.float(), chosen, weights.float()), first) for _ in range(3))


# Adapters


@pytest.fixture(scope="module", params=["scout", "maverick", "llama4-text", "qwen3", "deepseek", "mixtral"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, babies.make_baby(tmp_path_factory.mktemp(request.param), request.param)


def unfused(files: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A baby's canonical tensors by plain slices: gate is the first half of the LAST axis, stored [in, out]."""
    out = {}
    for name, tensor in files.items():
        if name.endswith(".experts.gate_up_proj"):
            width = tensor.shape[2] // 2
            for e in range(tensor.shape[0]):
                stem = name.replace("gate_up_proj", f"{e}.")
                out[f"{stem}gate_proj.weight"] = tensor[e, :, :width].transpose(0, 1)
                out[f"{stem}up_proj.weight"] = tensor[e, :, width:].transpose(0, 1)
        elif name.endswith(".experts.down_proj"):
            for e in range(tensor.shape[0]):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = tensor[e].transpose(0, 1)
        else:
            out[name] = tensor
    return out


def test_every_canonical_tensor_is_read_as_a_plain_slice_gives_it(stored: tuple[str, Path]) -> None:
    _, folder = stored
    adapter, source = load_adapter(folder), open_folder(folder)
    canonical = unfused(load_file(folder / "model.safetensors"))
    assert {name: tuple(t.shape) for name, t in canonical.items()} == adapter.expected()
    for name, tensor in canonical.items():
        got = read(adapter, source, name)
        assert torch.equal(got, tensor), name
        assert got.is_contiguous()


def test_disk_shapes_are_those_of_the_files_fused_or_not(stored: tuple[str, Path]) -> None:
    _, folder = stored
    adapter = load_adapter(folder)
    files = load_file(folder / "model.safetensors")
    assert adapter.disk_shapes(files.keys()) == {name: tuple(t.shape) for name, t in files.items()}
    apart = unfused(files)
    assert adapter.disk_shapes(apart.keys()) == {name: tuple(t.shape) for name, t in apart.items()}
    for name in apart:
        where = adapter.locate(name, apart.keys())
        assert (where.tensor, where.index, where.transposed) == (name, (), False)


LLAMA4_ROLES = {
    r"P model\.embed_tokens\.weight": Role.EMBEDDING,
    r"P lm_head\.weight": Role.HEAD,
    r"P model\.norm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.(input|post_attention)_layernorm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight": Role.ATTENTION,
    r"P model\.layers\.\d+\.feed_forward\.router\.weight": Role.ROUTER,
    r"P model\.layers\.\d+\.feed_forward\.shared_expert\.(gate|up|down)_proj\.weight": Role.SHARED,
    r"P model\.layers\.\d+\.feed_forward\.experts\.\d+\.(gate|up|down)_proj\.weight": Role.EXPERT,
    r"P model\.layers\.\d+\.feed_forward\.experts\.(gate_up|down)_proj": Role.EXPERT,
    r"P model\.layers\.\d+\.feed_forward\.(gate|up|down)_proj\.weight": Role.MLP,
    r"vision_model\..+": Role.VISION,
    r"multi_modal_projector\.linear_1\.weight": Role.VISION,
}
QWEN3_ROLES = {
    r"P model\.embed_tokens\.weight": Role.EMBEDDING,
    r"P lm_head\.weight": Role.HEAD,
    r"P model\.norm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.(input|post_attention)_layernorm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.self_attn\.[qk]_norm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight": Role.ATTENTION,
    r"P model\.layers\.\d+\.mlp\.gate\.weight": Role.ROUTER,
    r"P model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight": Role.EXPERT,
    r"P model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight": Role.MLP,
}
DEEPSEEK_ROLES = {
    r"P model\.embed_tokens\.weight": Role.EMBEDDING,
    r"P lm_head\.weight": Role.HEAD,
    r"P model\.norm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.(input|post_attention)_layernorm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.self_attn\.(q|kv)_a_layernorm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight": Role.ATTENTION,
    r"P model\.layers\.\d+\.mlp\.gate\.(weight|e_score_correction_bias)": Role.ROUTER,
    r"P model\.layers\.\d+\.mlp\.shared_experts\.(gate|up|down)_proj\.weight": Role.SHARED,
    r"P model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight": Role.EXPERT,
    r"P model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight": Role.MLP,
}
MIXTRAL_ROLES = {
    r"P model\.embed_tokens\.weight": Role.EMBEDDING,
    r"P lm_head\.weight": Role.HEAD,
    r"P model\.norm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.(input|post_attention)_layernorm\.weight": Role.NORM,
    r"P model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight": Role.ATTENTION,
    r"P model\.layers\.\d+\.block_sparse_moe\.gate\.weight": Role.ROUTER,
    r"P model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w[123]\.weight": Role.EXPERT,
}
ROLES = {"qwen3": QWEN3_ROLES, "deepseek": DEEPSEEK_ROLES, "mixtral": MIXTRAL_ROLES}
# Weights a block: 8 experts of three, a shared expert of three; qwen3's block 1 and maverick's even ones are dense.
COUNTS = {
    "scout": {Role.EXPERT: 4 * 24, Role.SHARED: 12, Role.MLP: 0, Role.ROUTER: 4, Role.ATTENTION: 16, Role.NORM: 9},
    "maverick": {Role.EXPERT: 2 * 24, Role.SHARED: 6, Role.MLP: 6, Role.ROUTER: 2, Role.ATTENTION: 16, Role.NORM: 9},
    "llama4-text": {
        Role.EXPERT: 4 * 24,
        Role.SHARED: 12,
        Role.MLP: 0,
        Role.ROUTER: 4,
        Role.ATTENTION: 16,
        Role.NORM: 9,
    },
    "qwen3": {Role.EXPERT: 2 * 24, Role.SHARED: 0, Role.MLP: 3, Role.ROUTER: 2, Role.ATTENTION: 12, Role.NORM: 13},
    # The router's bias counts with it; block 0 is dense.
    "deepseek": {Role.EXPERT: 2 * 24, Role.SHARED: 6, Role.MLP: 3, Role.ROUTER: 4, Role.ATTENTION: 15, Role.NORM: 13},
    "mixtral": {Role.EXPERT: 3 * 24, Role.SHARED: 0, Role.MLP: 0, Role.ROUTER: 3, Role.ATTENTION: 12, Role.NORM: 7},
}


def test_roles_are_what_a_person_would_say(stored: tuple[str, Path]) -> None:
    family, folder = stored
    adapter = load_adapter(folder)
    prefix = r"language_model\." if family in ("scout", "maverick") else ""
    rows = ROLES.get(family, LLAMA4_ROLES)
    table = [(re.compile(pattern.replace("P ", prefix)), role) for pattern, role in rows.items()]
    files = load_file(folder / "model.safetensors").keys()
    for name in adapter.expected().keys() | files:
        (role,) = [role for pattern, role in table if pattern.fullmatch(name)]
        assert adapter.role(name) is role, name
    counted = Counter(adapter.role(name) for name in adapter.expected())
    assert {role: counted[role] for role in COUNTS[family]} == COUNTS[family]
    assert counted[Role.EMBEDDING] == counted[Role.HEAD] == 1
    assert (counted[Role.VISION] > 0) == (family in ("scout", "maverick"))


def engine_units(family: str, adapter: Adapter) -> set[frozenset[str]]:
    """What vLLM fuses in each block, by its deepseek_v2.py and mixtral.py: qkv, or the projections that read the
    residual stream for MLA's latents; gate and up of a dense MLP; all experts of a layer."""
    units = set()
    for block in range(adapter.n_blocks):
        stem = f"{'language_model.' if family in ('scout', 'maverick') else ''}model.layers.{block}."
        units.add(frozenset([f"{stem}self_attn.o_proj"]))
        if family == "deepseek":
            units.add(frozenset([f"{stem}self_attn.q_a_proj", f"{stem}self_attn.kv_a_proj_with_mqa"]))
            units |= {frozenset([f"{stem}self_attn.{latent}_b_proj"]) for latent in ("q", "kv")}
        else:
            units.add(frozenset(f"{stem}self_attn.{p}_proj" for p in "qkv"))
        moe = {"maverick": block % 2 == 1, "qwen3": block != 1, "deepseek": block > 0}.get(family, True)
        feed = stem + {"qwen3": "mlp.", "deepseek": "mlp.", "mixtral": "block_sparse_moe."}.get(family, "feed_forward.")
        leaves = ("w1", "w2", "w3") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        if moe:
            units.add(frozenset(f"{feed}experts.{e}.{leaf}" for e in range(8) for leaf in leaves))
        shared = {"qwen3": "", "mixtral": "", "deepseek": "shared_experts."}.get(family, "shared_expert.")
        if shared or not moe:
            dense = feed + shared if moe else feed
            units.add(frozenset([f"{dense}gate_proj", f"{dense}up_proj"]))
            units.add(frozenset([f"{dense}down_proj"]))
    return units


def test_units_are_what_the_engine_fuses(stored: tuple[str, Path]) -> None:
    family, folder = stored
    adapter = load_adapter(folder)
    units: dict[str, set[str]] = {}
    for block in range(adapter.n_blocks):
        for _, module, _, _ in adapter.modules(block):
            units.setdefault(adapter.unit(module), set()).add(module)
    assert {frozenset(members) for members in units.values()} == engine_units(family, adapter)


def test_sites_hold_every_quantizable_weight_once_and_in_its_shape(stored: tuple[str, Path]) -> None:
    _, folder = stored
    adapter = load_adapter(folder)
    shapes = adapter.expected()
    found = []
    for block in range(adapter.n_blocks):
        for site, module, outputs, inputs in adapter.modules(block):
            assert module.startswith(adapter.block_prefix(block))
            assert shapes[f"{module}.weight"] == (outputs, inputs)
            assert adapter.role(f"{module}.weight") is site.role
            found.append(f"{module}.weight")
        keys = [site.key for site in adapter.sites(block)]
        assert len(set(keys)) == len(keys)
    assert sorted(found) == sorted(name for name in shapes if adapter.role(name) in QUANTIZABLE)

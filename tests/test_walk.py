"""The walk gives the logits of transformers' whole model (invariant 1), and leaves nothing behind.

The judge is the transformers model itself, in fp32, one row at a time, with the weights that were written to disk.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration

import babies
from onecard.calibration.sources import read_jsonl
from onecard.calibration.tokens import Encoder
from onecard.checkpoint.model import open_model
from onecard.checkpoint.source import open_folder
from onecard.core.device import Compute
from onecard.core.rows import Row, batches
from onecard.core.tensors import CPU, Allocate, Index, Stored, TensorInfo, TensorSource, pageable
from onecard.models.adapter import Adapter, Site
from onecard.models.block import find_experts
from onecard.models.families import load_adapter
from onecard.models.known import demo_folder
from onecard.models.walk import Embedder, Walk
from walking import make_rows, relative, walk_logits, whole_logits

FAMILIES = (
    "scout",
    "maverick",
    "maverick-as-published",
    "llama4-text",
    "qwen3",
    "qwen3-tied",
    "deepseek",
    "moonlight",
    "mixtral",
    "mixtral-as-published",
)


def make_variant(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """(model, its stored tensors). Some variants have settings of published models that babies.py lacks."""
    if family == "maverick-as-published":  # no QK norm, plain RoPE
        config = babies.llama4_config(moe_step=2)
        config.text_config.use_qk_norm = False
        config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        model: Any = Llama4ForConditionalGeneration(config).float().eval()
    elif (
        family == "qwen3-tied"
    ):  # tied head, routing weights not normalised after the softmax, every second block sparse
        config = babies.qwen3_config(layers=4)
        config.tie_word_embeddings, config.norm_topk_prob = True, False
        config.mlp_only_layers, config.decoder_sparse_step = [], 2
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    elif family == "moonlight":  # queries without a latent, one group of experts, plain RoPE
        config = babies.deepseek_config()
        config.q_lora_rank, config.n_group, config.topk_group, config.n_shared_experts = None, 1, 1, 2
        config.rope_parameters = {"rope_type": "default", "rope_theta": 50000.0}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    elif family == "mixtral-as-published":  # no window
        config = babies.mixtral_config()
        config.sliding_window = None
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    else:
        model = babies.make_model(family)
        return model, babies.published(family, model.state_dict())
    babies.randomize(model, seed=1)
    state = model.state_dict()
    if family == "qwen3-tied":
        state = {name: t for name, t in state.items() if name != "lm_head.weight"}
    like = {"qwen3-tied": "qwen3", "moonlight": "deepseek", "mixtral-as-published": "mixtral"}
    return model, babies.published(like.get(family, family), state)


@dataclass
class Pair:
    """One family: the model in memory and the same weights on disk."""

    family: str
    model: Any
    folder: Path
    adapter: Adapter
    source: TensorSource
    rows: list[Row] = field(default_factory=list)


def walk_over(pair: Pair, dtype: torch.dtype = torch.float32, source: TensorSource | None = None) -> Walk:
    return Walk.over(pair.adapter, source or pair.source, Compute(CPU, dtype, 1000))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model, state = make_variant(request.param)
    folder = babies.save(tmp_path_factory.mktemp(request.param), model.config, state)
    model.config.dtype = torch.float32
    adapter = load_adapter(folder)
    return Pair(request.param, model, folder, adapter, open_folder(folder), make_rows(adapter))


def test_logits_equal_the_whole_models(pair: Pair) -> None:
    got = walk_logits(pair.adapter, pair.source, pair.rows)
    for row, logits in zip(pair.rows, got, strict=True):
        assert relative(logits, whole_logits(pair.model, row)) < 1e-5, row.document


def test_logits_of_the_embedded_model_equal_the_whole_models() -> None:
    """Trained weights and real rows of code, prose, conversations and pictures, far over the attention chunk of 128."""
    model = open_model("demo")
    encoder = Encoder(model.path, model.adapter)
    documents = {d.kind: d for d in read_jsonl(demo_folder() / "data" / "evaluation.jsonl")}
    assert documents.keys() == {"code", "prose", "conversation", "image"}
    rows = [encoder.encode(document) for document in documents.values()]
    whole = Llama4ForConditionalGeneration.from_pretrained(str(model.path), dtype=torch.float32).eval()
    for row, logits in zip(rows, walk_logits(model.adapter, model.source, rows), strict=True):
        assert len(row.tokens) > 200
        assert relative(logits, whole_logits(whole, row)) < 1e-5, row.document


def test_a_batch_of_rows_gives_what_each_row_gives_alone(pair: Pair) -> None:
    together = walk_logits(pair.adapter, pair.source, pair.rows, batch_tokens=10_000)
    alone = walk_logits(pair.adapter, pair.source, pair.rows, batch_tokens=1)
    assert max(len(group) for group in batches(pair.rows, 10_000)) == 3
    for a, b in zip(together, alone, strict=True):
        assert relative(a, b) < 1e-5


def test_the_first_token_and_the_images_show_in_the_last_logits(pair: Pair) -> None:
    """Guards the tests above, which would prove little if both sides ignored context or pixels."""
    row = pair.rows[0]
    changed = [Row("first", "text", torch.cat([row.tokens[:1] + 1, row.tokens[1:]]), row.pixels)]
    if row.pixels is not None:
        changed.append(Row("blank", "text", row.tokens, torch.zeros_like(row.pixels)))
    as_is, *others = (walk_logits(pair.adapter, pair.source, [r])[0] for r in (row, *changed))
    # Where every layer slides, a token's influence ends where the windows, one after the other, end.
    window = getattr(pair.adapter.text_config, "sliding_window", None)
    reach = pair.adapter.n_blocks * (window - 1) if window else len(row.tokens) - 1
    assert relative(as_is[reach + 1 :], others[0][reach + 1 :]) < 1e-5 if window else reach
    for other, same_until in zip(others, (0, 2), strict=False):
        assert relative(as_is[reach : reach + 1], other[reach : reach + 1]) > 1e-3
        if same_until:
            assert relative(as_is[:same_until], other[:same_until]) < 1e-5, "nothing is seen before it comes"
    assert len(row.tokens) > 4 * getattr(pair.adapter.text_config, "attention_chunk_size", 0)


@pytest.mark.parametrize("family", ["scout", "qwen3"])
def test_a_sharded_checkpoint_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    one = babies.make_baby(tmp_path / "one", family)
    many = babies.make_baby(tmp_path / "many", family, shards=5)
    assert len(list(many.glob("*.safetensors"))) == 5
    adapter = load_adapter(many)
    rows = make_rows(adapter)
    whole, sharded = (walk_logits(adapter, open_folder(folder), rows) for folder in (one, many))
    for a, b in zip(whole, sharded, strict=True):
        assert torch.equal(a, b)


@dataclass
class Spy:
    """A TensorSource that records every read."""

    inner: TensorSource
    reads: list[tuple[str, Index]] = field(default_factory=list)

    @property
    def names(self) -> Collection[str]:
        return self.inner.names

    def info(self, name: str) -> TensorInfo:
        return self.inner.info(name)

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        return self.stored(name, index).on(CPU)

    def stored(self, name: str, index: Index = (), allocate: Allocate = pageable) -> Stored:
        self.reads.append((name, index))
        return self.inner.stored(name, index, allocate)


def test_a_block_reads_its_own_tensors_and_experts_one_by_one(pair: Pair) -> None:
    for index in range(pair.adapter.n_blocks):
        spy = Spy(pair.source)
        walk_over(pair, source=spy).load(index)
        prefix = pair.adapter.block_prefix(index)
        assert {name for name, _ in spy.reads} == {n for n in pair.source.names if n.startswith(prefix)}
        assert len(set(map(str, spy.reads))) == len(spy.reads), "nothing is read twice"
        for name, where in spy.reads:
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                assert isinstance(where[0], int), f"{name} is fused: one expert at a time"


def test_loaded_blocks_hold_no_gradients_and_nothing_on_meta(pair: Pair) -> None:
    for index in range(pair.adapter.n_blocks):
        layer = walk_over(pair, torch.bfloat16).load(index).layer
        for name, parameter in layer.named_parameters():
            is_router = name.startswith(f"{pair.adapter.router_name}.")
            dtype = torch.float32 if is_router else torch.bfloat16
            assert (parameter.device, parameter.dtype, parameter.requires_grad) == (CPU, dtype, False), name
        assert not [name for name, buffer in layer.named_buffers() if buffer.is_meta]


# Observing


def hooks_left(module: torch.nn.Module) -> list[str]:
    found = [n for n, m in module.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    stacks = find_experts(module)
    if stacks is None:
        return found
    return found + [name for name in ("observer", "tell_routes") if getattr(stacks, name) is not None]


Seen = tuple[torch.Tensor, torch.Tensor]  # token numbers [R], rows [R, in]


def observe_all(pair: Pair, row: Row) -> dict[tuple[int, str, int], Seen]:
    """(block, site key, expert) -> the calls that the walk's observer gets."""
    seen: dict[tuple[int, str, int], Seen] = {}
    walk = walk_over(pair)
    hidden = Embedder(walk, [row]).batch([0])
    for index in range(pair.adapter.n_blocks):
        block = walk.load(index)

        def observe(
            site: Site, expert: int, tokens: torch.Tensor, rows: torch.Tensor, _: object, index: int = index
        ) -> None:
            assert (index, site.key, expert) not in seen
            seen[index, site.key, expert] = tokens, rows

        with block.observed(observe):
            hidden = block.forward(hidden)
        assert hooks_left(block.layer) == []
    return seen


def transformers_inputs(pair: Pair, row: Row) -> dict[tuple[int, str], Any]:
    """(block, module path inside the block) -> arguments, by hooks on the whole model."""
    caught: dict[tuple[int, str], Any] = {}
    text = pair.model.language_model.model if hasattr(pair.model, "language_model") else pair.model.model
    handles = []
    for index, layer in enumerate(text.layers):
        for path, module in layer.named_modules():

            def hook(_: Any, args: Any, key: tuple[int, str] = (index, path)) -> None:
                caught[key] = tuple(a.detach().clone() for a in args if isinstance(a, torch.Tensor))

            handles.append(module.register_forward_pre_hook(hook))
    whole_logits(pair.model, row)
    for handle in handles:
        handle.remove()
    return caught


def expert_rows(pair: Pair, caught: dict[tuple[int, str], Any], block: int) -> dict[int, Seen]:
    """The inputs that transformers gives each expert of a block, without the rows of zeros that Llama 4's code adds."""
    if pair.adapter.family == "llama4":
        (routed,) = caught[block, "feed_forward.experts"]
        inputs = list(routed.unflatten(0, (pair.adapter.n_experts, -1)))
        mine = [rows.abs().sum(-1) > 0 for rows in inputs]
    else:
        hidden, chosen, _ = caught[block, "mlp.experts"]
        mine = [(chosen == e).any(-1) for e in range(pair.adapter.n_experts)]
        inputs = [hidden] * pair.adapter.n_experts
    return {e: (mask.nonzero()[:, 0], inputs[e][mask]) for e, mask in enumerate(mine) if mask.any()}


def test_observers_see_what_transformers_feeds_each_weight(pair: Pair) -> None:
    row = pair.rows[1]
    seen, caught = observe_all(pair, row), transformers_inputs(pair, row)
    sites = {(b, s.key): s for b in range(pair.adapter.n_blocks) for s in pair.adapter.sites(b)}
    assert {key[:2] for key in seen} == set(sites)
    for (block, key, expert), (tokens, rows) in seen.items():
        site = sites[block, key]
        assert rows.shape[1] == site.in_features
        if ".experts." not in key:
            path = site.first_module.removeprefix(pair.adapter.block_prefix(block))
            assert expert == 0
            twin = caught[block, path][0].flatten(0, -2)
            their_tokens = torch.arange(len(row.tokens))
        else:
            their_tokens, twin = expert_rows(pair, caught, block)[expert]
        assert torch.equal(tokens, their_tokens)
        if not key.endswith("experts.down"):  # there transformers has nothing to hook: test_experts.py computes it
            assert relative(rows, twin) < 1e-5, (block, key, expert)
    for block, key in sites:
        if ".experts." in key:
            got = {e: len(rows) for (b, k, e), (_, rows) in seen.items() if (b, k) == (block, key)}
            assert got == {e: len(rows) for e, (_, rows) in expert_rows(pair, caught, block).items()}
            assert sum(got.values()) == len(row.tokens) * pair.adapter.top_k


def test_nothing_is_left_hooked_even_after_a_failure(pair: Pair) -> None:
    block = walk_over(pair).load(0)
    hidden = torch.randn(2, 9, pair.adapter.hidden_size)

    def fail(site: Site, *_: object) -> None:
        raise RuntimeError(site.key)

    with pytest.raises(RuntimeError, match=r"^self_attn\.q(_a)?$"), block.observed(fail):
        block.routed(hidden)
    assert hooks_left(block.layer) == []
    before = block.forward(hidden)
    with block.observed(lambda *_: None):
        during = block.forward(hidden)
    assert torch.equal(before, during), "watching changes nothing"

"""Numbers that are not finite end every verb at once: one message names block, half and expert, and nothing is written.

Weights are finite and too large, so that only the walk can find it. Whose numbers they are decides the exit code: the
original's make it unusable (2), those of a quantized model are a bad result (1).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from babies import changed_copy, shard_files
from command_line import listing, refused, strict
from onecard.calibration.moments import SiteMoments
from onecard.checkpoint.model import open_model
from onecard.core.errors import NonfiniteError, UnusableModelError
from onecard.core.finite import all_finite, first_nonfinite
from onecard.eval.kl import compare_rows
from onecard.eval.summary import summarize
from onecard.models.adapter import Half
from outcomes import make_results, make_rows, with_values
from walking import cpu_walk

EXPERT = "layers.0.mlp.experts.3."
# What is too large -> (factor of every tensor with this in its name, what the message says).
TOO_LARGE: dict[str, tuple[dict[str, float], tuple[str, ...]]] = {
    "expert": ({f"{EXPERT}up_proj": 1e19, f"{EXPERT}down_proj": 1e22}, ("block 0", "feed-forward half", "expert 3")),
    "attention": ({"layers.1.self_attn.v_proj": 1e20, "layers.1.self_attn.o_proj": 1e22}, ("block 1, attention half",)),
    "dense": ({"layers.1.mlp.up_proj": 1e20, "layers.1.mlp.down_proj": 1e22}, ("block 1, feed-forward half",)),
    "attention scores": (
        {f"layers.1.self_attn.{part}": 1e20 for part in ("q_norm", "k_norm")},
        ("block 1, attention half",),
    ),
    "embedding": ({"embed_tokens": 1e19}, ("what the embedding",)),
    "head": ({"lm_head": 3.3e38}, ("the logits",)),
    "moments": ({f"{EXPERT}up_proj": 1e21, f"{EXPERT}down_proj": 1e-21}, ("block 0", "expert 3")),
}
ORIGINAL, QUANTIZED = "the original model's own numbers are not finite", "the quantized model's numbers are not finite"


@pytest.fixture(scope="module")
def overflowing(baby: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The baby with weights that are too large at one place."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        factors, _ = TOO_LARGE[kind]

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            factor = next((f for part, f in factors.items() if part in name), 1.0)
            return (tensor.float() * factor).to(tensor.dtype)

        if kind not in made:
            made[kind] = changed_copy(baby("qwen3"), tmp_path_factory.mktemp("too-large") / "model", change)
        return made[kind]

    return get


@pytest.mark.parametrize("method", ["rtn", "fast", "balanced"])
@pytest.mark.parametrize("kind", TOO_LARGE)
def test_a_run_over_an_original_that_overflows_names_the_place_and_leaves_nothing(
    overflowing: Callable[[str], Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    kind: str,
    method: str,
) -> None:
    """Round-to-nearest walks the original in its verification only; then OUT has files already, and they go."""
    arguments = ["--recipe", recipe(method=method), *texts]
    before = listing(tmp_path)
    result = onecard("quantize", overflowing(kind), tmp_path / "out", *arguments)
    if kind == "moments" and method == "rtn":  # all rows are finite, and nobody takes their moments
        assert result.exit_code == 0, result.output
        return
    if kind == "moments":  # of the quantized stream; what is finished is kept
        refused(result, QUANTIZED, *TOO_LARGE[kind][1], "the second moment", code=1)
        return
    refused(result, ORIGINAL, *TOO_LARGE[kind][1])
    assert listing(tmp_path) == before


VERBS: dict[str, Callable[..., list[object]]] = {
    "verify": lambda model, sound, **more: ["verify", model, sound, "--record", more["out"], *more["texts"][2:]],
    "flips": lambda model, sound, **more: ["flips", model, sound, "--items", 4, "--record", more["out"]],
    "generate": lambda model, sound, **more: ["generate", model, "hello"],
    "synthesize": lambda model, sound, **more: [
        *["calibration", "synthesize", model, more["out"].with_suffix(".jsonl"), "--block-by-block"],
        *["--recipe", more["recipe"], "--calibration", more["talks"]],
    ],
    "coverage": lambda model, sound, **more: [
        *["calibration", "coverage", model, "--recipe", more["recipe"], *more["texts"]],
    ],
    "pareto": lambda model, sound, **more: [
        *["pareto", model, "--recipe", more["recipe"], "--prices", more["out"], *more["texts"][:2]],
    ],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_walks_an_original_stops_where_it_overflows(
    overflowing: Callable[[str], Path],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    jsonl: Callable[..., Path],
    texts: list[str],
    tmp_path: Path,
    verb: str,
) -> None:
    talks = jsonl("talks.jsonl", [{"messages": [{"role": "user", "content": "why?"}]}])
    fit = {"bits": "fit", "fit_schemes": ["int4 group 32", "keep"], "gpu": None, "budget_gb": 0.0002, "method": "fast"}
    own = recipe(**fit, price_rows=2, price_row_tokens=20) if verb == "pareto" else recipe()
    more = {"out": tmp_path / "out", "texts": texts, "recipe": own, "talks": talks}
    result = onecard(*VERBS[verb](overflowing("expert"), baby("qwen3"), **more))
    refused(result, ORIGINAL, "block 0, feed-forward half, expert 3")
    assert not (tmp_path / "out").exists()


# --- a quantized model


def scaled(checkpoint: Path, out: Path, factors: dict[str, float]) -> Path:
    """A finished checkpoint with the scales of some matrices times a factor, of 1e38 at most: all are finite."""
    shutil.copytree(checkpoint, out)
    for shard in shard_files(out):
        tensors = load_file(shard)
        for part, factor in factors.items():
            for name in [n for n in tensors if part in n and n.endswith("_scale")]:
                tensors[name] = (tensors[name].double() * factor).clamp(-1e38, 1e38).to(tensors[name].dtype)
                assert all_finite(tensors[name])
        save_file(tensors, shard, metadata={"format": "pt"})
    return out


SCALES = {
    "what the expert gives overflows": ({f"{EXPERT}up_proj": 1e19, f"{EXPERT}down_proj": 1e22}, "expert 3 gives"),
    "squares of what it gives overflow": ({f"{EXPERT}down_proj": 1e22}, "expert 3 gives numbers whose products"),
    "code times scale overflows": ({f"{EXPERT}down_proj": 1e60}, "the weights of expert 3"),
}


@pytest.mark.parametrize("verb", ["verify", "flips"])
@pytest.mark.parametrize("kind", SCALES)
def test_a_checkpoint_that_overflows_is_a_bad_result(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    kind: str,
    verb: str,
) -> None:
    factors, said = SCALES[kind]
    checkpoint = scaled(emitted("qwen3")[0], tmp_path / "checkpoint", factors)
    more = texts[2:] if verb == "verify" else ["--items", 4]
    result = onecard(verb, baby("qwen3"), checkpoint, *more, "--record", tmp_path / "record.json")
    refused(result, QUANTIZED, "block 0, feed-forward half", said, code=1)
    assert not (tmp_path / "record.json").exists()


def test_what_is_finite_is_measured_however_bad(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """Squares of these weights are beyond fp32, the errors are not: every figure is there."""
    checkpoint = scaled(emitted("qwen3")[0], tmp_path / "c", {f"{EXPERT}gate_proj": 1e22, f"{EXPERT}down_proj": 1e-10})
    result = onecard("verify", baby("qwen3"), checkpoint, *texts[2:], "--record", tmp_path / "record.json")
    assert result.exit_code == 0, result.output
    record = strict((tmp_path / "record.json").read_text())
    worst = record["errors"]["worst_experts"][0]
    assert (worst["block"], worst["expert"]) == (0, 3)
    assert worst["weight_error"] > 1e20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_named(
    emitted: Callable[..., tuple[Path, Result]],
    baby: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    bad: float,
) -> None:
    """Before anything is walked; the name tells block, half and expert."""
    checkpoint = Path(shutil.copytree(emitted("qwen3")[0], tmp_path / "checkpoint"))
    for shard in shard_files(checkpoint):
        tensors = load_file(shard)
        for name in [n for n in tensors if n.endswith(f"{EXPERT}up_proj.weight_scale")]:
            tensors[name][0, 0] = bad
        save_file(tensors, shard, metadata={"format": "pt"})
    for verb, more in (("verify", texts[2:]), ("flips", ["--items", 4])):
        named = f"model.{EXPERT}up_proj.weight_scale holds"
        refused(onecard(verb, baby("qwen3"), checkpoint, *more), named, code=1)  # the checkpoint's fault
        refused(onecard(verb, checkpoint, checkpoint, *more), named)  # the original's


@pytest.mark.parametrize("format_name", ["bf16", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("bad", [float("nan"), 1e38])
def test_no_export_writes_numbers_that_are_not_finite(
    emitted: Callable[..., tuple[Path, Result]],
    onecard: Callable[..., Result],
    tmp_path: Path,
    format_name: str,
    bad: float,
) -> None:
    """A scale of 1e38 is finite and stays one where codes and scales are kept; its products are not."""
    checkpoint = Path(shutil.copytree(emitted("qwen3")[0], tmp_path / "checkpoint"))
    for shard in shard_files(checkpoint):
        tensors = load_file(shard)
        for name in [n for n in tensors if n.endswith(f"{EXPERT}down_proj.weight_scale")]:
            tensors[name].fill_(bad)
        save_file(tensors, shard, metadata={"format": "pt"})
    result = onecard("export", checkpoint, "--format", format_name, "-o", tmp_path / "out")
    if format_name == "compressed-tensors" and bad == 1e38:
        assert result.exit_code == 0, result.output
        return
    by_format = 2 if format_name == "gptq" and bad == 1e38 else 1  # fp16 scales cannot hold it
    refused(result, f"model.{EXPERT}down_proj", code=by_format)
    assert not (tmp_path / "out" / "config.json").exists()


# --- part by part


@pytest.mark.parametrize("half", [None, *Half])
@pytest.mark.parametrize("family", ["scout", "maverick", "qwen3", "deepseek", "mixtral"])
def test_a_pass_names_the_half_and_the_expert_of_every_family(
    baby: Callable[..., Path], family: str, half: Half | None
) -> None:
    """Whatever weight is spoilt, and whether the block is run whole or by halves. A later pass works again."""
    model = open_model(str(baby(family)))
    index = max(block for block in range(2) if model.adapter.is_moe(block))
    block = cpu_walk(model).load(index)
    hidden = torch.randn(4, 9, model.adapter.hidden_size, generator=torch.Generator().manual_seed(0))
    routes = block.routed(hidden, half if half is Half.FEED_FORWARD else None).routes_TK
    assert routes is not None
    assert block.experts is not None
    expert = int(routes[0, 0])
    before = block.forward(hidden, half)
    spoilt = {
        Half.FEED_FORWARD: (block.experts.down[expert], f"feed-forward half, expert {expert} gives"),
        Half.ATTENTION: (block.weight(model.adapter.sites(index)[0].first_module), "attention half gives"),
    }
    for part, (weight, said) in spoilt.items():
        if half not in (None, part):
            continue
        kept = weight.clone()
        weight.fill_(torch.nan)
        for altered, error in ((block, UnusableModelError), (block.for_quantized_rows(), NonfiniteError)):
            for call in (altered.forward, altered.routed, altered.differentiable):
                with pytest.raises(error, match=f"block {index}, {said}"):
                    call(hidden, half)
        weight.copy_(kept)
    assert torch.equal(block.forward(hidden, half), before)
    assert block.experts.observer is None
    with pytest.raises(UnusableModelError, match=f"what enters block {index}"):
        block.forward(hidden * torch.inf, half)


@pytest.mark.parametrize("place", ["sum", "miss", "slope"])
def test_a_moment_names_its_expert(place: str) -> None:
    rows = torch.ones(3, 4)
    moments = SiteMoments(3, 4, torch.device("cpu"), miss_rows=2, slopes=5)
    for expert in range(3):
        moments.add(expert, rows)
    moments.refuse_nonfinite(False, "here", by_expert=True)
    huge = 1e30
    match place:
        case "sum":
            moments.add(1, rows * huge)
        case "miss":
            moments.add_miss(1, rows * huge, torch.ones(3, 2) * huge)
        case "slope":
            moments.add_slopes(1, torch.ones(3, 5) * huge)
    with pytest.raises(NonfiniteError, match="here, expert 1: the second moment"):
        moments.refuse_nonfinite(False, "here", by_expert=True)
    with pytest.raises(UnusableModelError, match="here: the second moment"):
        moments.refuse_nonfinite(True, "here", by_expert=False)


@pytest.mark.parametrize(("side", "error"), [(0, UnusableModelError), (1, NonfiniteError), (None, NonfiniteError)])
def test_logits_are_never_compared_where_they_are_not_finite(side: int | None, error: type[Exception]) -> None:
    """The argmax of NaN agrees with itself: the same top-1 of two such models would be 100 %."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, 8, generator=generator) for _ in range(2)]
    heads = [torch.randn(30, 8, generator=generator) for _ in range(2)]
    place = torch.arange(5)
    compare_rows((rows[0], rows[1]), (heads[0], heads[1]), place, place, place)
    if side is None:
        rows = [torch.ones(5, 1)] * 2
        heads = [sign * 2e38 * torch.linspace(-1, 1, 30)[:, None] for sign in (1, -1)]
    else:
        heads[side][7] = torch.nan
    with pytest.raises(error, match="further apart" if side is None else "the logits"):
        compare_rows((rows[0], rows[1]), (heads[0], heads[1]), place, place, place)


def test_a_perplexity_beyond_every_number_is_left_out() -> None:
    rows = make_rows([9, 12, 7], 20)
    results = make_results(rows, 20)
    far = with_values(results, logp_quantized=results.logp_quantized - 1e4)
    found = summarize(far)
    assert found.perplexity_quantized is None
    assert found.perplexity_ratio is None
    assert found.perplexity_reference == pytest.approx(float(torch.exp(-results.logp_reference.double().mean())))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_number_of_many_is_found(dtype: torch.dtype, bad: float) -> None:
    stack = torch.full((4, 3, 5), torch.finfo(dtype).max, dtype=dtype)
    stack[::2] *= -1
    assert all_finite(stack, torch.empty(0), torch.empty(3, device="meta"))
    assert first_nonfinite(stack, stack) is None
    other: Any = stack.clone()
    other[2, 1, 3] = bad
    assert not all_finite(stack, other)
    assert first_nonfinite(stack, other) == 2

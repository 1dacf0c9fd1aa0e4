"""Weights that are looked at as they are loaded (on a GPU) end as those that are searched before (on a CPU): in one
message that names every tensor, with one exit code, nothing left, and the same matrices of zeros in the record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from reads import watch_reads
from test_zero_experts import prune

from babies import changed_copy
from command_line import listing, refused
from onecard import stages
from onecard.checkpoint.checked import outside_blocks
from onecard.checkpoint.model import open_model
from onecard.core.device import Compute
from onecard.core.errors import ResourceError

FUSED = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
PLACES = {
    "fused expert": FUSED,
    "norm of a block": "language_model.model.layers.0.input_layernorm.weight",
    "router": "language_model.model.layers.1.feed_forward.router.weight",
    "embedding": "language_model.model.embed_tokens.weight",
    "head": "language_model.lm_head.weight",
    "vision tower": "vision_model.layernorm_post.weight",
}


@pytest.fixture
def as_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does."""
    monkeypatch.setattr(Compute, "checks_first", False)


def spoilt(model: Path, out: Path, *names: str) -> Path:
    """A copy with one NaN and one Inf in the last entry of these tensors: of an embedding, no text reads it."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in names:
            last = tensor[-1] if tensor.ndim > 1 else tensor
            last.view(-1)[:2] = torch.tensor([torch.nan, torch.inf])
        return tensor

    return changed_copy(model, out, change)


@pytest.mark.usefixtures("as_loaded")
@pytest.mark.parametrize(
    ("place", "keys"),
    [(place, {"method": "rtn"}) for place in PLACES]
    + [("fused expert", {"method": "fast"}), ("router", {"method": "balanced"})]
    + [("fused expert", {"method": "bnb-int8", "format": "bitsandbytes", "group_size": -1})]
    + [("fused expert", {"method": "rtn", "quantize_roles": ["attention"]})],
)
def test_a_run_names_every_tensor_and_leaves_nothing(
    baby: Callable[..., Path],
    tmp_path: Path,
    refuse: Callable[..., str],
    recipe: Callable[..., Path],
    place: str,
    keys: dict[str, Any],
) -> None:
    model = spoilt(baby("scout"), tmp_path / "model", PLACES[place], FUSED)
    said = [f"{name} holds 1 NaN, 1 Inf" for name in {PLACES[place], FUSED}]
    refuse(model, "holds non-finite values", *said, use=recipe(**keys))


@pytest.mark.usefixtures("as_loaded")
@pytest.mark.parametrize("method", ["rtn", "fast"])
def test_a_run_knows_the_zeros_although_it_was_stopped(
    copied: Callable[..., Path],
    onecard: Callable[..., Result],
    recipe: Callable[..., Path],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    method: str,
) -> None:
    """The zeros are in block 0; the run is stopped in block 1 and resumed."""
    model, out = copied("scout"), tmp_path / "out"
    names = prune(model, "scout")
    command = ["quantize", model, out, "--recipe", recipe(method=method), *texts]
    quantize_block = stages.quantize_block

    def stopped(job: Any) -> dict[str, Any]:
        if job.index == 1:
            raise ResourceError("the disk is full")
        return quantize_block(job)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "quantize_block", stopped)
        refused(onecard(*command), "the disk is full", code=4)
    result = onecard(*command, "--resume")
    assert result.exit_code == 0, result.stderr
    assert json.loads((out / "onecard.json").read_text())["model"]["zero_matrices"] == names


@pytest.mark.parametrize("verb", ["verify", "flips"])
@pytest.mark.usefixtures("as_loaded")
def test_a_pair_is_judged_as_it_is_walked(
    baby: Callable[..., Path],
    emitted: Callable[..., tuple[Path, Result]],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
    verb: str,
) -> None:
    """The exit code says whose fault it is."""
    more = texts[2:] if verb == "verify" else ["--items", 4]
    scale = FUSED.replace(".gate_up_proj", ".3.up_proj.weight_scale")
    checkpoint = spoilt(emitted("scout")[0], tmp_path / "checkpoint", scale)
    before = listing(tmp_path)
    refused(onecard(verb, baby("scout"), checkpoint, *more), f"{scale} holds 1 NaN, 1 Inf", code=1)
    original = spoilt(baby("scout"), tmp_path / "original", FUSED)
    refused(onecard(verb, original, emitted("scout")[0], *more), f"{FUSED} holds 1 NaN, 1 Inf")
    refused(onecard(verb, original, checkpoint, *more), f"{FUSED} holds 1 NaN, 1 Inf")
    assert [name for name in listing(tmp_path) if "original" not in str(name)] == list(before)


@pytest.mark.usefixtures("as_loaded")
def test_blocks_are_not_read_before_the_walk(
    baby: Callable[..., Path],
    emitted: Callable[..., tuple[Path, Result]],
    onecard: Callable[..., Result],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`verify` reads every weight of a block once in all, of the original and of the checkpoint."""
    pair = open_model(str(baby("scout"))), open_model(str(emitted("scout")[0]))
    reads = watch_reads(monkeypatch)
    result = onecard("verify", pair[0].path, pair[1].path, *texts[2:])
    assert result.exit_code == 0, result.output
    for model in pair:
        outside = outside_blocks(model)
        assert model.adapter.embedding_name in outside
        times = reads.times(model.folder)
        assert times.keys() == set(model.folder.names)
        assert {name: n for name, n in times.items() if name not in outside and n != 1} == {}

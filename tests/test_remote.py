"""`plan` and `inspect` of a hub id: config.json and headers are fetched, weights are not; every failure is one message.

The hub is a thread on 127.0.0.1 (hub_standin.py), with its large files on a second server, as the hub's are on its CDN.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from huggingface_hub import constants

import foreign
from command_line import listing, refused
from hollow import QWEN3, published, write_hollow
from hub_standin import TOKEN, Hub, serve, take_place
from onecard.checkpoint import remote
from onecard.checkpoint.model import open_headers, resolve_model

REPO = "somebody/model"


def put(hub: Hub, folder: Path, repo: str = REPO) -> None:
    """Show a folder as a repository; weights are served from their files."""
    hub.repos[repo] = {p.name: p if p.suffix == ".safetensors" else p.read_bytes() for p in folder.iterdir()}


def weight_bytes(hub: Hub) -> int:
    return sum(count for name, count in hub.served.items() if name.endswith(".safetensors"))


def line(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return dict(json.loads(result.stdout))


def same(far: dict[str, Any], near: dict[str, Any]) -> bool:
    """Equal apart from name, path, estimated times, which rest on rates measured anew, and what rests on the RAM that
    is free at the moment."""
    named = {"model", "path", "estimated_seconds", "estimated_seconds_by", "rates"}
    named |= {key for key in far if "ram" in key or "rows_" in key or "disk" in key}
    return {k: v for k, v in far.items() if k not in named} == {k: v for k, v in near.items() if k not in named}


# --- what is fetched


def test_a_plan_of_a_hub_id_fetches_headers_and_is_that_of_the_folder(
    hub: Hub, onecard: Callable[..., Result], tmp_path: Path
) -> None:
    """61 GB in 16 shards are planned from their headers, each of which needs a second request. The token reaches the
    hub and not the CDN."""
    folder = write_hollow(tmp_path / "hollow", published(QWEN3), shards=16)
    put(hub, folder)
    use = ("--recipe", "qwen3-30b-a3b-24gb", "--device", "cpu")
    assert same(line(onecard("plan", REPO, *use)), line(onecard("plan", folder, *use)))
    headers = sum(int.from_bytes(p.open("rb").read(8), "little") + 8 for p in folder.glob("*.safetensors"))
    assert headers / 16 > remote.FIRST_BYTES, "a header is longer than what is asked for at first"
    assert weight_bytes(hub) == headers, "not a byte behind the headers"
    assert TOKEN in hub.tokens
    assert hub.cdn_tokens == {""}
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in left) < 10_000_000, "config.json and the index alone"
    assert sorted({path.name for path in left if "snapshots" in path.parts}) == [
        "config.json",
        "model.safetensors.index.json",
    ]


def test_inspect_of_a_hub_id_takes_the_beginning_of_each_shard(
    hub: Hub, onecard: Callable[..., Result], baby: Callable[..., Path]
) -> None:
    folder = baby("scout", 2, 3)
    put(hub, folder)
    assert same(line(onecard("inspect", REPO)), line(onecard("inspect", folder)))
    assert set(hub.served) == {"config.json", "model.safetensors.index.json", *(p.name for p in folder.glob("*.saf*"))}
    assert all(count <= remote.FIRST_BYTES for name, count in hub.served.items() if name.endswith(".safetensors"))


def test_a_server_without_ranges_is_not_read_to_the_end(
    hub: Hub, onecard: Callable[..., Result], baby: Callable[..., Path], tmp_path: Path
) -> None:
    """A CDN without ranges would send 61 GB. The client reads only the header, plus what was already on the way."""
    put(hub, write_hollow(tmp_path / "hollow", json.loads((baby("qwen3") / "config.json").read_text())))
    hollow = hub.repos[REPO]["model.safetensors"]
    long = json.dumps({"x": {"dtype": "U8", "shape": [2**36], "data_offsets": [0, 2**36]}}).encode()
    with hollow.open("wb") as file:
        file.write(len(long).to_bytes(8, "little") + long)
        file.truncate(8 + len(long) + 2**36)
    hub.ranges = False
    assert onecard("inspect", REPO).exit_code == 2, "a model of one tensor is none of this config"
    assert weight_bytes(hub) < 50_000_000


def by_row(weight: torch.Tensor) -> foreign.Written:
    """compressed-tensors with one scale a row: only `weight_shape` tells how many inputs a row of words has."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    words = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int64)
    return {
        "weight_packed": words.to(torch.int32),
        "weight_scale": torch.ones(rows, 1, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }, weight.double()


ROWS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"all": {"targets": ["Linear"], "weights": ROWS}},
    "ignore": ["lm_head"],
}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(("write", "block"), [(by_row, PACKED), (foreign.nf4, NF4)], ids=["by row", "nf4"])
def test_what_keeps_shapes_beside_its_weights_is_inspected_from_a_few_of_them(
    hub: Hub,
    onecard: Callable[..., Result],
    baby: Callable[..., Path],
    tmp_path: Path,
    write: foreign.Writer,
    block: dict[str, Any],
) -> None:
    chosen = [name for name in foreign.unfused(baby("qwen3")) if ".experts." in name or ".self_attn.o_proj." in name]
    folder, _ = foreign.quantized_pair(baby("qwen3"), tmp_path, write, set(chosen).__contains__, block, torch.bfloat16)
    put(hub, folder)
    assert same(line(onecard("inspect", REPO)), line(onecard("inspect", folder)))
    assert len(hub.fetched) < len(chosen), "a request a kind of weight, not one a weight"
    refused(onecard("plan", REPO, "--recipe", "rtn-int4"), f"{REPO} is quantized already")


def test_a_weight_cannot_be_read_of_headers(hub: Hub, baby: Callable[..., Path]) -> None:
    put(hub, baby("qwen3"))
    model = open_headers(REPO)
    with pytest.raises(AssertionError, match="asked for a weight"):
        model.source.get("model.norm.weight")
    with pytest.raises(AssertionError, match="asked for a digest"):
        model.facts()


# --- what goes wrong


def without(folder: Path, *names: str) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in names}


@pytest.mark.parametrize("verb", [("inspect",), ("plan", "--recipe", "rtn-int4")])
def test_each_failure_is_one_message_with_the_way_out(
    hub: Hub, onecard: Callable[..., Result], baby: Callable[..., Path], verb: tuple[str, ...]
) -> None:
    folder = baby("scout", 2, 3)
    first = "model-00001-of-00003.safetensors"

    def ask(*needles: str, code: int = 2) -> None:
        refused(onecard(verb[0], REPO, *verb[1:]), REPO, *needles, code=code)

    ask("shows no such model", "check the name", "hf auth login")
    put(hub, folder)
    hub.gated.add(REPO)
    ask("is gated", "hf auth login", "name a local folder")
    hub.gated.clear()
    hub.repos[REPO] = without(folder, "config.json")
    ask("no config.json")
    hub.repos[REPO] = without(folder, "model.safetensors.index.json", *(p.name for p in folder.glob("*.safetensors")))
    ask("holds no safetensors checkpoint")
    hub.repos[REPO] |= {"pytorch_model.bin": b"pickle"}
    ask("holds pickle files", "pytorch_model.bin", "safetensors version")
    hub.repos[REPO] = without(folder, first)
    ask(f"the shard {first} is missing", "name another checkpoint")
    hub.repos[REPO] = without(folder) | {first: (folder / first).read_bytes()[:-1]}
    ask(f"{first} is truncated or damaged")
    hub.repos[REPO] = without(folder) | {first: b"<html>", "model-00002-of-00003.safetensors": b"{}" * 99}
    ask(f"{first} is no safetensors file", "model-00002-of-00003.safetensors is no safetensors file")


def test_without_network_what_was_downloaded_is_opened(
    hub: Hub, onecard: Callable[..., Result], baby: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = without(baby("qwen3"))
    assert onecard("inspect", REPO).exit_code == 0, "config.json is in the cache now, and no weights"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(onecard("inspect", REPO), "the hub could not give it", "copy the checkpoint's folder here", code=4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    resolve_model(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert line(onecard("inspect", REPO))["family"] == "qwen3_moe"


def test_a_hub_that_does_not_answer_is_exit_code_4(
    onecard: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve() as gone:
        pass
    take_place(gone, monkeypatch, tmp_path)
    refused(onecard("inspect", REPO), "the hub could not give it", "without network", code=4)
    assert listing(tmp_path) == {}

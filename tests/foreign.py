"""Writers of other tools' formats: one weight -> its stored parts, and the weight in fp64 that they mean.

They follow the formats' specifications with Python's own integers, or call the format's own package where it runs on a
CPU. They share no code with what is tested.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

from onecard.checkpoint.packed import PackedSource, open_packed
from onecard.checkpoint.source import open_folder
from onecard.models.adapter import read
from onecard.models.families import load_adapter

# Stored parts by the last part of their names, and the dense weight that they mean.
Written = tuple[dict[str, torch.Tensor], torch.Tensor]
Writer = Callable[[torch.Tensor], Written]
Block = dict[str, Any]  # a quantization_config


def ct_block(*weights: Block, form: str = "pack-quantized", targets: tuple[str, ...] = ("Linear",)) -> Block:
    """A quantization_config of compressed-tensors with a group for each of `weights`."""
    groups = {f"group_{n}": {"targets": [targets[n % len(targets)]], "weights": w} for n, w in enumerate(weights)}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def opened(folder: Path, stored: dict[str, torch.Tensor], block: Block, stem: str = "m.") -> PackedSource:
    """The source for a folder with one weight's parts."""
    folder.mkdir(
        exist_ok=True
    )  # callers give each call its own folder: a source reads its file only when asked for a tensor
    save_file({stem + leaf: part.contiguous() for leaf, part in stored.items()}, folder / "model.safetensors")
    return open_packed(open_folder(folder), block)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def words_of(values: list[int], bits: int) -> list[int]:
    """Packs fields one after the other, lowest bit first, into words of 32 bits."""
    stream = sum(value << (bits * at) for at, value in enumerate(values))
    return [signed(stream >> (32 * n) & 0xFFFFFFFF) for n in range(-(-len(values) * bits // 32))]


def rounded(weight: torch.Tensor, bits: int, group_of: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [O, I], scales fp16 [O, G], zeros [O, G], all unsigned: round-to-nearest, asymmetric."""
    top, members = 2**bits - 1, torch.tensor(group_of)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    scales, zeros = [], []
    for group in range(max(group_of) + 1):
        part = weight[:, members == group].double()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / top).half().double()
        zero = (-low / scale).round().clamp(1, top)
        codes[:, members == group] = (part / scale[:, None] + zero[:, None]).round().clamp(0, top).long()
        scales.append(scale), zeros.append(zero.long())
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def gptq(weight: torch.Tensor, bits: int = 4, group: int = 32, version: int = 1, shuffled: bool = False) -> Written:
    """AutoGPTQ's layout. `shuffled` assigns inputs to groups in random order (desc_act)."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(inputs)
    group_of = (order // group).tolist()
    codes, scales, zeros = rounded(weight, bits, group_of)
    stored = {
        "qweight": torch.tensor([words_of(row, bits) for row in codes.tolist()], dtype=torch.int32).T,
        "qzeros": torch.tensor(
            [words_of([z - (version == 1) for z in row], bits) for row in zeros.T.tolist()], dtype=torch.int32
        ),
        "scales": scales.T.half(),
        "g_idx": torch.tensor(group_of, dtype=torch.int32),
    }
    return stored, (codes - zeros[:, group_of]).double() * scales[:, group_of]


def nf4(weight: torch.Tensor, kind: str = "nf4", nested: bool = True, storage: torch.dtype = torch.uint8) -> Written:
    """The parts that transformers saves for a bitsandbytes Linear. The package reads them back flat: on a CPU its
    0.50.2 misreads blocks that run across rows (test_bitsandbytes.py)."""
    codes, state = quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    stored = {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    state.shape = torch.Size([weight.numel()])
    return {k: v.clone() for k, v in stored.items()}, dequantize_4bit(codes, state).double().view(weight.shape)


def nf4_twin(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same weight, value by value by the specification, in fp64 before rounding to the dtype."""
    key = next(k for k in stored if ".quant_state." in k)
    state = json.loads(bytes(stored[key].tolist()))
    absmax = stored["weight.absmax"].double()
    if "weight.nested_absmax" in stored:
        of = torch.arange(len(absmax)) // state["nested_blocksize"]
        absmax = stored["weight.nested_quant_map"].double()[stored["weight.absmax"].long()]
        absmax = absmax * stored["weight.nested_absmax"].double()[of] + state["nested_offset"]
    pairs = stored["weight"].view(torch.uint8).flatten().long()
    codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten()
    values = stored["weight.quant_map"].double()[codes] * absmax[torch.arange(len(codes)) // state["blocksize"]]
    return values.view(state["shape"])


def fp8(weight: torch.Tensor, block: tuple[int, int] = (32, 32), suffix: str = "weight_scale_inv") -> Written:
    """DeepSeek's layout: e4m3 with one fp32 scale for each block; blocks at the edges are cut off."""
    rows, columns = weight.shape
    stored, dense = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns).double()
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            part = weight[place].float()
            scales[i, j] = part.abs().max() / 448
            stored[place] = (part / scales[i, j]).to(torch.float8_e4m3fn)
            dense[place] = stored[place].double() * scales[i, j].double()
    return {"weight": stored, suffix: scales}, dense


def unfused(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a baby under its canonical name."""
    adapter, source = load_adapter(folder), open_folder(folder)
    return {name: read(adapter, source, name) for name in adapter.expected()}


def write_like(baby: Path, out: Path, tensors: dict[str, torch.Tensor], block: dict[str, Any] | None) -> Path:
    """Writes a folder with the baby's config and tokenizer, these tensors and this quantization_config."""
    out.mkdir()
    for path in baby.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith("index.json"):
            shutil.copy(path, out / path.name)
    config = json.loads((baby / "config.json").read_text())
    if block is not None:
        config["quantization_config"] = block
    (out / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


def quantized_pair(
    baby: Path, at: Path, write: Writer, chosen: Callable[[str], bool], block: dict[str, Any], dtype: torch.dtype
) -> tuple[Path, Path]:
    """The baby with every chosen weight in the writer's format, and its twin with the dense weights that these mean, in
    `dtype`."""
    packed, dense = {}, {}
    for name, weight in unfused(baby).items():
        if chosen(name):
            stored, meant = write(weight)
            stem = name.removesuffix("weight")
            packed |= {stem + leaf: part for leaf, part in stored.items()}
            dense[name] = meant.to(dtype)
        else:
            packed[name] = dense[name] = weight
    return write_like(baby, at / "packed", packed, block), write_like(baby, at / "twin", dense, None)

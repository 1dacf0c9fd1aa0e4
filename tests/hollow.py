"""Published models without their weights: config.json, true safetensors headers, and a hole in place of the data.

A plan reads headers alone, so a sparse file of a few megabytes is enough to plan for Scout's 217 GB. Reading a weight
gives zeros. Configs are in data/. Those of Llama 4 were checked against transformers and vLLM, and correct what early
copies had wrong (rope scaling, temperature tuning). Those of Qwen3-30B-A3B, DeepSeek-V3 and Mixtral-8x7B are as
published.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onecard.core.tensors import TensorInfo
from onecard.models.families import load_adapter

DATA = Path(__file__).parent / "data"
SCOUT, MAVERICK, QWEN3, DEEPSEEK = "llama4-scout", "llama4-maverick", "qwen3-30b-a3b", "deepseek-v3"
MIXTRAL = "mixtral-8x7b"


def published(name: str) -> dict[str, Any]:
    """The config.json of SCOUT, MAVERICK, QWEN3, DEEPSEEK or MIXTRAL."""
    return dict(json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")))


def write_hollow(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None = None, shards: int = 1
) -> Path:
    """Writes a checkpoint with real headers and no data, in bf16: `tensors`, or by default those that the config's
    family has on disk. With several `shards` the tensors are dealt out in turn, and there is an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is None:
        shapes = load_adapter(folder).disk_shapes(())
        tensors = {name: TensorInfo(shape, "BF16") for name, shape in shapes.items()}
    if shards == 1:
        write_hole(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = list(tensors)[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_hole(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(info.nbytes for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_hole(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Writes one safetensors file: its header, and a hole of the size that the header promises."""
    header: dict[str, Any] = {}
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + offset)

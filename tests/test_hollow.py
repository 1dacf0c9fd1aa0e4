"""The hollow models have the published ones' parameters, in files that take no disk space."""

from pathlib import Path

import pytest
from safetensors import safe_open

from hollow import MAVERICK, QWEN3, SCOUT, published, write_hollow
from onecard.checkpoint.inspect import inspect
from onecard.models.families import load_adapter


# Scout: counted by hand from Meta's published shapes. Maverick, Qwen3: from their model cards (400B; 30.5B).
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        (SCOUT, 108_641_793_536, 108_641_793_536),
        (MAVERICK, 400_000_000_000, 402_000_000_000),
        (QWEN3, 30_500_000_000, 30_550_000_000),
    ],
)
def test_a_published_config_has_the_published_parameters(name: str, least: int, most: int, tmp_path: Path) -> None:
    folder = write_hollow(tmp_path / name, published(name))
    assert least <= inspect(str(folder))["parameters"] <= most
    assert load_adapter(folder).faults(published(name)) == [], "none of the wrong copies"
    assert sum(file.stat().st_blocks for file in folder.iterdir()) * 512 < 10_000_000


def test_other_peoples_reader_opens_hollow_shards(tmp_path: Path) -> None:
    folder = write_hollow(tmp_path / "model", published(QWEN3), shards=3)
    names = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(str(shard), "pt") as file:
            names |= set(file.keys())
    assert names == set(load_adapter(folder).expected())

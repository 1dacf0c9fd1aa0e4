"""What layers cache, from transformers' own configs: against what transformers' own cache object keeps."""

from types import SimpleNamespace

import pytest
from transformers import Llama4TextConfig
from transformers.cache_utils import DynamicCache

from babies import llama4_config, qwen3_config
from onecard.models.cache import CacheLayer, Split, attention_caches
from onecard.models.llama4 import Llama4Adapter
from onecard.models.qwen3_moe import Qwen3MoeAdapter


def test_llama4_sees_everything_in_every_fourth_layer_and_a_chunk_in_the_others() -> None:
    layers = Llama4Adapter(Llama4TextConfig()).cache_layers()
    everything = [i for i, layer in enumerate(layers) if layer == CacheLayer("global", 2048, None, 8)]
    assert everything == list(range(3, 48, 4))
    assert [layer for layer in layers if layer.local] == [CacheLayer("chunked", 2048, 8192, 8)] * 36


@pytest.mark.parametrize("config", [llama4_config().text_config, qwen3_config()], ids=["llama4", "qwen3"])
def test_the_windows_are_those_of_transformers_cache(config: object) -> None:
    theirs = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    assert [layer.window for layer in attention_caches(config)] == theirs


def test_a_config_without_kinds_of_layers_slides_if_it_has_a_window() -> None:
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=8, hidden_size=64, sliding_window=7)
    assert attention_caches(config) == (CacheLayer("sliding", 2 * 64, 7, 8),) * 2
    config.sliding_window = None
    assert attention_caches(config) == (CacheLayer("global", 2 * 64, None, 8),) * 2
    config.layer_types = ["mamba", "full_attention"]
    with pytest.raises(ValueError, match="names mamba"):
        attention_caches(config)


def test_every_matrix_of_a_block_is_cut_as_megatron_cuts_it() -> None:
    for adapter in (Llama4Adapter(llama4_config()), Qwen3MoeAdapter(qwen3_config())):
        for name, shape in adapter.expected().items():
            split = adapter.split(name)
            reads = name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight"))
            if adapter.role(name).value in ("expert", "shared_expert", "mlp") and reads:
                assert split is Split.OUTPUTS
            if adapter.role(name).value in ("norm", "router", "vision"):
                assert split is Split.COPIED, (name, shape)

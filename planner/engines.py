"""How each engine uses memory: its cache's blocks and dtypes, and its share of a card.

The facts were read in the sources, not measured: vLLM 0.32.0 (v1/kv_cache_interface.py, v1/core/kv_cache_utils.py,
config/), transformers 5.23 (cache_utils.py), llama.cpp (src/llama-kv-cache-iswa.cpp). Where versions differ, the plan
uses the one that leaves less memory.
"""

from dataclasses import dataclass, field
from fractions import Fraction

from ..core.errors import InputError

# Bytes of one cached number. In q8_0, 32 one-byte numbers share an fp16 scale.
KV_DTYPES = {"bf16": Fraction(2), "fp8": Fraction(1), "q8_0": Fraction(34, 32)}


@dataclass(frozen=True)
class Engine:
    """How one engine uses memory."""

    name: str
    kv_dtypes: tuple[str, ...]
    # A cache's length is rounded up to a multiple of this.
    block_tokens: int
    # The default fraction of the visible memory that the engine uses.
    memory_share: float
    # Tokens of one forward pass while it reads prompts. None means the whole prompt.
    batch_tokens: int | None
    # Passes whose tokens may be in a local layer's cache in addition to its window.
    batches_in_flight: int = 1
    # Whether local layers give old tokens back by default.
    frees: bool = True
    tensor_parallel: bool = False
    # Whether the engine unpacks packed weights to the original's dtype when it loads them.
    dequantizes: bool = False
    graphs: bool = False
    notes: tuple[str, ...] = field(default=())


ENGINES = {
    # Older versions take a share of 0.9, version 0.32 takes 0.92. The plan uses the smaller one. Scheduling ahead (the
    # default) holds two batches. The server reads 8192 tokens on cards of 70 GiB and more; cards.py has the others.
    "vllm": Engine("vllm", ("bf16", "fp8"), 16, 0.9, 8192, batches_in_flight=2, tensor_parallel=True, graphs=True),
    # generate() reads a prompt in one pass unless it is given a prefill_chunk_size. Until the next token, a local
    # layer's cache is a view of the whole prompt's keys. So nothing is freed yet when memory use peaks.
    "transformers": Engine("transformers", ("bf16",), 1, 1.0, None, frees=False, dequantizes=True),
    # The number of cells is rounded up to 256. A local layer has cells for its window and one micro-batch.
    "llama.cpp": Engine("llama.cpp", ("bf16", "q8_0"), 256, 1.0, 512),
}


def engine_named(name: str, kv_dtype: str, tensor_parallel: int) -> Engine:
    """The engine of that name. Raises InputError if it is unknown, or lacks the cache dtype or tensor parallelism."""
    if name not in ENGINES:
        raise InputError(f"the engine {name!r} is not known: {', '.join(ENGINES)}")
    engine = ENGINES[name]
    if kv_dtype not in engine.kv_dtypes:
        raise InputError(f"{name} has no {kv_dtype} KV cache: --kv-dtype {' or '.join(engine.kv_dtypes)}")
    if tensor_parallel > 1 and not engine.tensor_parallel:
        raise InputError(f"several cards are planned for vllm only, not for {name}: leave out --tensor-parallel")
    return engine

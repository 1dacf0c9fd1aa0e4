"""What an engine does with memory: blocks of its cache, types of its cache, how much of a card it takes.

Read in the sources, not measured: vLLM 0.32.0 (v1/kv_cache_interface.py, v1/core/kv_cache_utils.py, config/),
transformers 5.23 (cache_utils.py), llama.cpp (src/llama-kv-cache-iswa.cpp). Where versions differ, the one that leaves
less is taken.
"""

from dataclasses import dataclass, field
from fractions import Fraction

from ..core.errors import InputError

# Bytes of one cached number. q8_0: 32 numbers of a byte share an fp16 scale.
KV_DTYPES = {"bf16": Fraction(2), "fp8": Fraction(1), "q8_0": Fraction(34, 32)}


@dataclass(frozen=True)
class Engine:
    """block_tokens:   what a cache's length is rounded up to
    memory_share:      of the memory that a program sees, what the engine takes unless told otherwise
    batch_tokens:      tokens of one forward pass while prompts are read; None: the whole prompt
    batches_in_flight: passes whose tokens may lie in a local layer's cache beside its window
    frees:             whether local layers' old tokens are given back, where nobody asks for anything else
    dequantizes:       whether packed weights are unpacked to the original's dtype when they are loaded
    """

    name: str
    kv_dtypes: tuple[str, ...]
    block_tokens: int
    memory_share: float
    batch_tokens: int | None
    batches_in_flight: int = 1
    frees: bool = True
    tensor_parallel: bool = False
    dequantizes: bool = False
    graphs: bool = False
    notes: tuple[str, ...] = field(default=())


ENGINES = {
    # 0.9 of old, 0.92 in version 0.32: the smaller one is planned with. Scheduling ahead (the default) holds two
    # batches. 8192: what the server takes on cards of 70 GiB and more; cards.py has the others.
    "vllm": Engine("vllm", ("bf16", "fp8"), 16, 0.9, 8192, batches_in_flight=2, tensor_parallel=True, graphs=True),
    # A prompt is read in one pass unless generate() is given a prefill_chunk_size, and until the next token a local
    # layer's cache is a view of the whole prompt's keys: nothing is freed when it counts.
    "transformers": Engine("transformers", ("bf16",), 1, 1.0, None, frees=False, dequantizes=True),
    # Cells are rounded to 256; a local layer has its window's and one micro-batch's.
    "llama.cpp": Engine("llama.cpp", ("bf16", "q8_0"), 256, 1.0, 512),
}


def engine_named(name: str, kv_dtype: str, tensor_parallel: int) -> Engine:
    """Raises InputError for an engine that is not known, or that cannot do what is asked of it."""
    if name not in ENGINES:
        raise InputError(f"the engine {name!r} is not known: {', '.join(ENGINES)}")
    engine = ENGINES[name]
    if kv_dtype not in engine.kv_dtypes:
        raise InputError(f"{name} has no {kv_dtype} KV cache: --kv-dtype {' or '.join(engine.kv_dtypes)}")
    if tensor_parallel > 1 and not engine.tensor_parallel:
        raise InputError(f"several cards are planned for vllm only, not for {name}: leave out --tensor-parallel")
    return engine

"""llama.cpp's loading rules for a GGUF file, from the source that llama-cpp-python 0.3.36 carries.

llama.cpp requests tensors by names and shapes that follow from the file's own metadata. A tensor that is missing, has
another shape, or is not requested ends in an error. A folder of safetensors breaks a rule too, and its message says
what to export. The gguf package opens the file; weights are not read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .rules import Rule

MODEL = "llama.cpp src/llama-model.cpp, load_hparams"
LOADER = "llama.cpp src/llama-model-loader.cpp"
ARCHITECTURES = ("llama4", "qwen3moe")
# Metadata without which llama.cpp does not start; {} is the architecture.
KEYS = (
    "{}.context_length",
    "{}.embedding_length",
    "{}.block_count",
    "{}.feed_forward_length",
    "{}.attention.head_count",
    "{}.attention.layer_norm_rms_epsilon",
    "{}.expert_count",
    "{}.expert_used_count",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
)
OF_LLAMA4 = ("llama4.expert_feed_forward_length", "llama4.interleave_moe_layer_step")
# Llama 4's attention chunk, fixed in src/models/llama4.cpp whatever the model was trained with.
CHUNK = 8192
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
WHOLE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GgufView:
    """A folder of GGUF files as the rules see it."""

    # Names of the .gguf files.
    files: tuple[str, ...]
    # Scalars and strings; for a list its length.
    metadata: Mapping[str, Any] = field(default_factory=dict)
    # Name -> (type, shape in torch's order).
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    # The attention chunk of a config.json in the folder.
    chunk: int | None = None
    # Why a file could not be opened.
    unread: str | None = None

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> int:
        """An integer of the architecture's metadata; 0 if it is missing or no integer."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0


def look_gguf(folder: Path, chunk: int | None = None) -> GgufView:
    """Open all GGUF files of the folder. Raises only ImportError, without the gguf package."""
    files = tuple(sorted(path.name for path in folder.glob("*.gguf")))
    if not files:
        return GgufView(files)
    from gguf import GGUFReader

    metadata: dict[str, Any] = {}
    tensors = {}
    try:
        for file in files:
            reader = GGUFReader(folder / file)
            for name, item in reader.fields.items():
                value = item.contents()
                metadata.setdefault(name, len(value) if isinstance(value, list) else value)
            for tensor in reader.tensors:
                tensors[tensor.name] = (tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)))
    except (ValueError, OSError, KeyError, IndexError) as error:
        return GgufView(files, unread=f"{file}: {error}")
    return GgufView(files, metadata, tensors, chunk)


def there(view: GgufView) -> Iterator[str]:
    if not view.files:
        yield "the folder holds no .gguf file"
    if view.unread is not None:
        yield f"{view.unread}"


def architecture(view: GgufView) -> Iterator[str]:
    if view.tensors and view.architecture not in ARCHITECTURES:
        yield f"general.architecture is {view.architecture!r}: {', '.join(ARCHITECTURES)} are known here"


def metadata(view: GgufView) -> Iterator[str]:
    if view.architecture not in ARCHITECTURES:
        return
    keys = [key.format(view.architecture) for key in KEYS] + list(OF_LLAMA4 if view.architecture == "llama4" else ())
    yield from (f"{key} is missing" for key in keys if key not in view.metadata)
    if view.metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.merges" not in view.metadata:
        yield "tokenizer.ggml.merges is missing"
    if view.metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in view.metadata:
        yield "tokenizer.ggml.pre is missing: llama.cpp would split text by its default rule"


def expected(view: GgufView) -> dict[str, tuple[int, ...] | None]:
    """Every tensor that llama.cpp requests -> its shape in torch's order, None when the metadata do not say."""
    hidden, experts = view.number("embedding_length"), view.number("expert_count")
    heads, kv = view.number("attention.head_count"), view.number("attention.head_count_kv")
    head = view.number("attention.key_length") or (hidden // heads if heads else 0)
    vocab, width = view.metadata.get("tokenizer.ggml.tokens"), view.number("expert_feed_forward_length")
    dense = view.number("feed_forward_length")
    step = view.number("interleave_moe_layer_step") if view.architecture == "llama4" else 1
    found: dict[str, tuple[int, ...] | None] = {
        "token_embd.weight": (vocab, hidden) if isinstance(vocab, int) else None,
        "output_norm.weight": (hidden,),
    }
    for block in range(view.number("block_count")):
        stem = f"blk.{block}."
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (heads * head, hidden),
            "attn_k": (kv * head, hidden),
            "attn_v": (kv * head, hidden),
            "attn_output": (hidden, heads * head),
        }
        if view.architecture == "qwen3moe":
            shapes |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        if step and (block + 1) % step == 0:
            shapes |= _mlp(EXPERTS, hidden, width, (experts,)) | {"ffn_gate_inp": (experts, hidden)}
            shapes |= _mlp(SHARED, hidden, width) if view.architecture == "llama4" else {}
        else:
            shapes |= _mlp(DENSE, hidden, dense)
        found |= {f"{stem}{name}.weight": shape for name, shape in shapes.items()}
    return found


def _mlp(
    names: tuple[str, str, str], hidden: int, width: int, before: tuple[int, ...] = ()
) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    return {gate: (*before, width, hidden), up: (*before, width, hidden), down: (*before, hidden, width)}


OPTIONAL = ("output.weight", "rope_freqs.weight")


def names(view: GgufView) -> Iterator[str]:
    if view.architecture not in ARCHITECTURES:
        return
    wanted = expected(view)
    yield from (f"{name} is missing" for name in wanted if name not in view.tensors)
    yield from (f"{name} is not asked for" for name in view.tensors if name not in wanted and name not in OPTIONAL)


def shapes(view: GgufView) -> Iterator[str]:
    if view.architecture not in ARCHITECTURES:
        return
    for name, shape in expected(view).items():
        kind, stored = view.tensors.get(name, ("", shape))
        if shape is not None and stored != shape:
            yield f"{name} is {kind} {list(stored or ())}, and the metadata say {list(shape)}"


def experts_whole(view: GgufView) -> Iterator[str]:
    whole = [n for n, (kind, _) in view.tensors.items() if kind in WHOLE and any(f".{e}." in n for e in EXPERTS)]
    packed = [n for n, (kind, _) in view.tensors.items() if kind not in WHOLE]
    if whole and packed:
        yield f"{len(whole)} expert tensors are kept whole ({whole[0]}, ...)"


def chunk(view: GgufView) -> Iterator[str]:
    context = view.number("context_length")
    if view.architecture == "llama4" and view.chunk not in (None, CHUNK) and context > view.chunk:
        yield f"config.json has an attention chunk of {view.chunk}, and the file a context of {context}"


RULES = (
    Rule(
        "gguf",
        "error",
        there,
        "llama.cpp reads GGUF alone: `onecard export CHECKPOINT --format gguf -o OUT`. int4 in groups of 32 becomes "
        "Q4_0 (asymmetric: Q4_1) and int8 in groups of 32 Q8_0 without changing a code.",
        f"{LOADER}, llama_model_loader",
    ),
    Rule(
        "architecture",
        "warning",
        architecture,
        "These rules know Llama 4 and Qwen3-MoE alone.",
        "llama.cpp src/llama-arch.cpp",
    ),
    Rule(
        "metadata",
        "error",
        metadata,
        "Export it again with the original's config.json and tokenizer in the folder.",
        f"{MODEL}; src/models/llama4.cpp, qwen3moe.cpp; src/llama-vocab.cpp",
    ),
    Rule(
        "names",
        "error",
        names,
        "llama.cpp ends in `missing tensor` or `wrong number of tensors`; it wants the experts of a layer in one 3-D "
        "tensor a projection. Export it again.",
        f"{LOADER}, check_tensor_dims and done_getting_tensors; src/models/llama4.cpp, qwen3moe.cpp",
    ),
    Rule(
        "shapes",
        "error",
        shapes,
        "Export it again, metadata and weights of one model.",
        f"{LOADER}, check_tensor_dims",
    ),
    Rule(
        "experts-bf16",
        "warning",
        experts_whole,
        "It loads, and is not as small as it could be: quantize with groups of 32.",
        "llama.cpp ggml/src/ggml-common.h (block_q4_0: 32 values a scale)",
    ),
    Rule(
        "chunk",
        "warning",
        chunk,
        "llama.cpp has 8192 built in: run it with a context (-c) of no more than the model's own chunk.",
        "llama.cpp src/models/llama4.cpp, load_arch_hparams",
    ),
)

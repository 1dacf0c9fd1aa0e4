"""The names of the formats that `onecard export` writes, known without loading torch."""

from ..core.errors import InputError

FORMAT_NAMES = ("compressed-tensors", "gptq", "gptq-v2", "bnb-nf4", "bf16", "gguf")


def refuse_unknown_format(name: str) -> None:
    """Raises InputError for a name that is none of FORMAT_NAMES."""
    if name not in FORMAT_NAMES:
        raise InputError(f"the format {name!r} is not known: {', '.join(FORMAT_NAMES)}")

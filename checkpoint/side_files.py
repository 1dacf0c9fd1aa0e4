"""The files of a checkpoint that are neither weights nor config.json: which go along, and which are left behind.

What goes along belongs to the model whatever its weights are stored in: tokenizer, processors, chat templates, settings
of generation, licence terms. They are known by name. A suffix says nothing: `adapter_config.json` without its weights
makes transformers refuse the folder, and `hf_quant_config.json` or the index of other weights contradict what is
emitted.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

from ..core.errors import InputError
from ..core.file_names import TEMPLATE_FOLDER
from . import files

# Licence terms and notices, which are published beside the weights.
TERMS = tuple(
    "".join(f"[{c}{c.lower()}]" if c.isalpha() else c for c in word) + "*"  # in upper and lower case
    for word in ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "THIRD_PARTY")
)
CARRIED = (
    *("tokenizer*.json", "tekken.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "tokenizer.model*", "*.tiktoken"),
    *("*processor_config.json", "generation_config.json", "SYSTEM_PROMPT.txt"),
    *("*.jinja", "chat_template.json", f"{TEMPLATE_FOLDER}/*.jinja"),
    *TERMS,
)
# What transformers with peft loads on top of the weights beside it.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MOST_NAMED = 8


def side_files(source: Path) -> list[str]:
    """The names of the files that go along, sorted; those in TEMPLATE_FOLDER with their folder."""
    found = {path for pattern in CARRIED for path in source.glob(pattern)}
    return sorted(str(path.relative_to(source)) for path in found if path.is_file())


def carry_side_files(source: Path, out: Path) -> None:
    """Copy the files that go along."""
    for name in side_files(source):
        files.make_folder((out / name).parent)
        files.write_bytes(out / name, (source / name).read_bytes())


def side_files_digest(source: Path) -> str:
    """SHA-256 over names and contents of the files that `carry_side_files` copies."""
    sha = hashlib.sha256()
    for name in side_files(source):
        sha.update(name.encode() + hashlib.sha256((source / name).read_bytes()).digest())
    return sha.hexdigest()


def left_behind(source: Path, used: Collection[str]) -> list[str]:
    """One line that names what does not go along, or none. `used`: files that were read (weights, config.json) or are
    written anew. Hidden files are not named."""
    known = {*used, *side_files(source), TEMPLATE_FOLDER}
    names = sorted(
        path.name + "/" * path.is_dir()
        for path in source.iterdir()
        if path.name not in known and not path.name.startswith(".")
    )
    if not names:
        return []
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return [f"left behind, as no part of what is emitted: {', '.join(names[:MOST_NAMED])}{more}"]


def adapter_beside(source: Path) -> str | None:
    """The name of a file that shows that the folder means its weights with an adapter on top; None without one."""
    return next((name for name in ADAPTER_FILES if (source / name).is_file()), None)


def adapter_warnings(source: Path) -> list[str]:
    """What reading the weights alone misses."""
    found = adapter_beside(source)
    if found is None:
        return []
    return [f"{found} lies beside the weights: transformers with peft adds the adapter, and it is not read here"]


def refuse_adapter(source: Path, without_adapter: bool) -> None:
    """Raises InputError for an adapter beside the weights, unless the user wants them without it."""
    found = adapter_beside(source)
    if found is not None and not without_adapter:
        raise InputError(
            f"{source} holds an adapter beside its weights ({found}), and transformers with peft means both: merge it "
            "into the weights first (peft's merge_and_unload), or take the weights alone with --without-adapter"
        )

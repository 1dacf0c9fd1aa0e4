"""Recipe: one flat YAML file that says what is quantized, how, on which texts, and what the run may not do.

The file is flat, so that it can be read aloud; the class groups its keys by what they are about. A key has the same
name in the file and in its group. Unknown keys are errors, and so is a pattern that matches nothing (found when the
recipe meets a model).
"""

import hashlib
import json
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from .core.errors import InputError, input_error
from .core.limits import Limits, named_limits
from .core.method import PRESETS, Method
from .core.scheme import GRIDS, Scheme

QuantizableRole = Literal["expert", "shared_expert", "mlp", "attention"]
# In `schemes`, in place of a width: the weight stays in the source's dtype.
KEEP = "keep"
# The keys that a method of bitsandbytes fixes: the package gives no choice.
FIXED = ("bits", "group_size", "symmetric")


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextSource(BaseModel):
    """One source: `demo`, a file or folder (its path from the recipe's own folder), or a Hugging Face data set with
    its config and split. calibration/columns.py says what the columns and keys may hold; none are needed where they
    have their usual names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    source: str = Field(default="demo", min_length=1)
    config: str | None = None
    split: str = "train"
    column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    role_key: str | None = None
    content_key: str | None = None
    image_column: str | None = None
    kind: str | None = Field(default=None, pattern=r"^[\w-]{1,32}$")  # what it is called in the record; None: its own
    weight: float = Field(default=1.0, gt=0)  # its share of a mixture's tokens, beside the others' weights

    @model_validator(mode="after")
    def _sound(self) -> "TextSource":
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column go together: give both or neither")
        if self.prompt_column is not None and self.column is not None:
            raise ValueError("column and prompt_column contradict each other: give one of them")
        return self


class Texts(TextSource):
    """One source, or a mixture of several."""

    mixture: tuple[TextSource, ...] = ()

    @model_validator(mode="after")
    def _one_or_many(self) -> "Texts":
        plain = TextSource.model_fields
        beside = sorted(key for key in plain if getattr(self, key) != plain[key].default)
        if self.mixture and beside:
            raise ValueError(f"a mixture's sources have keys of their own: move {', '.join(beside)} into its entries")
        if self.model_fields_set == {"mixture"} and not self.mixture:
            raise ValueError("the mixture is empty")
        return self


class Widths(_Group):
    """Which weights get which width."""

    # fit: the widths among `fit_schemes` with the least predicted KL within a budget (bits/fitting.py).
    bits: Literal[4, 8, "fit"] = 4
    # Weights that share a scale; -1: one scale a row.
    group_size: int = 128
    symmetric: bool = True
    quantize_roles: tuple[QuantizableRole, ...] = ("expert", "shared_expert")
    # Widths that differ from bits, group_size and symmetric: role, or glob pattern of module names -> 'int8 group 128',
    # 'int4 by row', ..., or 'keep'. A name wins over a pattern, a pattern over a role, a later pattern over an earlier.
    schemes: dict[str, str] = {}
    # Glob patterns of module names that stay as they are.
    keep_modules: tuple[str, ...] = ()


class Fit(_Group):
    """bits: fit. What is priced, and the budget."""

    fit_schemes: tuple[str, ...] = ("int4 group 128", "int4 group 64", "int4 group 32", "int8 group 128", KEEP)
    # Decimal GB of safetensors files. None: what `gpu` leaves for weights.
    budget_gb: float | None = Field(default=None, gt=0)
    # This many calibration rows, cut to this many tokens, price the units; the others give the statistics.
    price_rows: int = Field(default=64, ge=1)
    price_row_tokens: int = Field(default=512, ge=2)


class Serving(_Group):
    """The card, and what it has to hold beside the weights. A run that would not fit it is refused (planner/fit.py)."""

    gpu: str | None = None
    context: int = Field(default=32_768, ge=1)
    sequences: int = Field(default=1, ge=1)
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    engine: Literal["vllm", "transformers", "llama.cpp"] = "vllm"
    # Tokens of one pass over prompts. None: the engine's own default.
    engine_batch_tokens: int | None = Field(default=None, ge=16)
    # Whether the vision tower is loaded.
    vision: bool = True


class TextChoice(_Group):
    """Which texts calibrate and which evaluate, and how many of them."""

    calibration: Texts = Texts()
    calibration_rows: int = Field(default=512, ge=1)
    calibration_row_tokens: int = Field(default=2048, ge=2)
    # Stop after this many calibration rows per input dimension, counted for an evenly loaded expert; 0: never.
    calibration_rows_per_input: float = Field(default=0.0, ge=0)
    calibration_seed: int = 0
    # A share of the calibration tokens in rows of this length, so that chunked attention sees more than one chunk.
    calibration_long_share: float = Field(default=0.0, ge=0, le=1)
    calibration_long_row_tokens: int = Field(default=16384, ge=2)
    # Pack this many rows for each that is used; one pass chooses those that feed starved experts
    # (calibration/balance.py). 1: no pass.
    calibration_pool: float = Field(default=1.0, ge=1, le=64)
    # The share of the rows that is drawn at random all the same.
    calibration_random_share: float = Field(default=0.5, ge=0, le=1)
    warn_below_expert_rows: int = Field(default=256, ge=0)

    evaluation: Texts = Texts(split="test")
    evaluation_rows: int = Field(default=128, ge=1)
    evaluation_row_tokens: int = Field(default=2048, ge=2)
    # Multiple-choice items that both models answer during verification (eval/tasks.py): demo, mmlu, ..., or files.
    tasks: tuple[str, ...] = ()
    task_shots: int = Field(default=0, ge=0, le=32)
    # Items of each task, drawn by a seed. None: all.
    task_items: int | None = Field(default=None, ge=1)


class Recipe(_Group):
    """A frozen recipe. `model_validate` and `model_dump` take and give the flat keys of the YAML file."""

    # The recipe file's folder. Paths in a recipe begin there, so that a recipe travels with its texts.
    _folder: Path = PrivateAttr(default=Path())

    name: str
    description: str
    # The model family that the recipe is for. None: every family.
    family: Literal["deepseek_v3", "llama4", "mixtral", "qwen3_moe"] | None = None
    # Printed with the plan and kept in the record.
    note: str | None = None
    # What OUT holds (conversion/export.py). All formats hold the same codes, and bf16 what they stand for; bitsandbytes
    # has its own codes and belongs to its own methods.
    format: Literal["compressed-tensors", "gptq", "gptq-v2", "bf16", "gguf", "bitsandbytes"] = "compressed-tensors"
    # auto: float32 on a CPU, bfloat16 on a GPU.
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_tokens: int = Field(default=8192, ge=1)
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000)

    # The groups. Their aliases cannot be keys of a file, so that a file stays flat.
    widths: Widths = Field(default=Widths(), alias="<widths>")
    fit: Fit = Field(default=Fit(), alias="<fit>")
    quantizer: Method = Field(default=Method(), alias="<quantizer>")
    texts: TextChoice = Field(default=TextChoice(), alias="<texts>")
    card: Serving = Field(default=Serving(), alias="<card>")
    limits: Limits = Field(default=Limits(), alias="<limits>")

    @model_validator(mode="before")
    @classmethod
    def _grouped(cls, data: Any) -> Any:
        """Flat keys to their groups, with the method's own values where the recipe names none."""
        if not isinstance(data, dict):
            return data
        method = data.get("method", Method.model_fields["method"].default)
        preset = PRESETS.get(method, {}) if isinstance(method, str) else {}
        grouped: dict[str, Any] = {}
        for key, value in (preset | data).items():
            group = _GROUP_OF.get(key)
            if group is None:
                grouped[key] = value
            else:
                grouped.setdefault(f"<{group}>", {})[key] = value
        return grouped

    @model_serializer(mode="wrap")
    def _flat(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in dump(self).items():
            flat |= value if key.strip("<>") in _GROUPS else {key: value}
        return flat

    @model_validator(mode="after")
    def _sound(self) -> "Recipe":
        method = self.quantizer.method
        if (method in GRIDS) != (self.format == "bitsandbytes"):
            raise ValueError(
                f"method {method} and format {self.format} contradict each other: bitsandbytes quantizes by its "
                f"own functions, so that {' and '.join(GRIDS)} are the methods of its format and of no other"
            )
        if method in GRIDS:
            own = PRESETS[method] | {"symmetric": True}
            wrong = [f"{key} {own[key]}" for key in FIXED if getattr(self.widths, key) != own[key]]
            if wrong:
                raise ValueError(f"method {method} has {', '.join(wrong)} and no other: leave it out")
            if any(words != KEEP for words in self.widths.schemes.values()):
                raise ValueError(f"method {method} knows one width: `schemes` may say '{KEEP}' and no more")
        _ = self.scheme  # refuses what contradicts itself
        for words in (*self.widths.schemes.values(), *self.fit.fit_schemes):
            if words != KEEP:
                Scheme.parse(words)
        if self.widths.bits == "fit":
            self._sound_fit()
        if not self.name.isprintable() or not (self.note or "").isprintable():
            raise ValueError("name or note holds control characters")
        if self.limits.max_flip_rate is not None and not self.texts.tasks:
            raise ValueError("max_flip_rate needs tasks: no answer would be looked at")
        if not self.widths.quantize_roles:
            raise ValueError("quantize_roles is empty: nothing would be quantized")
        if self.quantizer.tune_epochs and not self.quantizer.reference_correction:
            raise ValueError("tune_epochs needs reference_correction: there is nothing else to learn from")
        texts = self.texts
        long_tokens = texts.calibration_long_share * texts.calibration_rows * texts.calibration_row_tokens
        if 0 < long_tokens < texts.calibration_long_row_tokens:
            raise ValueError(
                f"calibration_long_share gives {long_tokens:,.0f} tokens to long rows, and one has "
                f"{texts.calibration_long_row_tokens:,} (calibration_long_row_tokens)"
            )
        return self

    def _sound_fit(self) -> None:
        if (self.fit.budget_gb is None) == (self.card.gpu is None):
            raise ValueError("bits: fit needs a budget: gpu (with context and sequences) or budget_gb, one of them")
        if self.card.engine != "vllm":
            raise ValueError(f"bits: fit mixes widths as vLLM loads them, and engine is {self.card.engine}")
        if self.format != "compressed-tensors":
            raise ValueError(f"bits: fit mixes widths as compressed-tensors holds them, and format is {self.format}")
        if not set(self.fit.fit_schemes) - {KEEP}:
            raise ValueError("fit_schemes names no width: nothing would be quantized")

    @property
    def scheme(self) -> Scheme:
        """What every module gets that `schemes` says nothing of; of a recipe that is yet to be fitted, the least."""
        widths = self.widths
        bits = 4 if widths.bits == "fit" else widths.bits
        return Scheme(bits, widths.group_size, widths.symmetric, GRIDS.get(self.quantizer.method, "int"))

    def scheme_of(self, role: str, module: str) -> tuple[Scheme | None, list[str]]:
        """The scheme of a module, None where it stays as it is; and the entries of `schemes` that mean it."""
        schemes = self.widths.schemes
        scheme = self.scheme if role in self.widths.quantize_roles else None
        # Names as they are, of which a fitted recipe has thousands, need no matching.
        patterns = [key for key in _patterns(tuple(schemes)) if matches(key, module)]
        hits = [key for key in (role, *patterns, module) if key in schemes]
        for key in hits:
            scheme = None if schemes[key] == KEEP else Scheme.parse(schemes[key])
        return scheme, hits

    def changed(self, **fields: Any) -> "Recipe":
        """The recipe with other values of some fields, checked anew. Raises InputError."""
        try:
            made = Recipe.model_validate(self.model_dump() | fields)
        except ValidationError as error:
            raise _refusal(f"the recipe {self.name}, as it was changed,", error) from None
        made._folder = self._folder
        return made

    def within(self, budget_gb: float) -> "Recipe":
        """The recipe with `bits: fit` and a budget of files in decimal GB, whatever its card. Raises InputError."""
        return self.changed(bits="fit", budget_gb=budget_gb, gpu=None)

    @property
    def folder(self) -> Path:
        return self._folder

    def __eq__(self, other: object) -> bool:
        """By what it says, not by where it lies."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(
        f.name.removesuffix(".yaml")
        for f in resources.files(f"{__package__}.recipes").iterdir()
        if f.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, or of a file. Raises InputError."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the recipe {name} cannot be read: {error}") from None
    if name not in recipe_names():
        raise InputError(f"there is no recipe {name!r}: {', '.join(recipe_names())}, or the path of a .yaml file")
    return (resources.files(f"{__package__}.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """YAML as it is written: a key that stands there twice is a mistake, not the last one's."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} stands there twice")
        return super().construct_mapping(node, deep)


def load_recipe(name: str | Path) -> Recipe:
    """Read and check a recipe: the name of a shipped one, or the path of a YAML file.

    Raises InputError listing every offending key.
    """
    name = str(name)
    data = _read_yaml(f"the recipe {name}", recipe_text(name), "print one with `onecard recipes demo`")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _refusal(f"the recipe {name}", error) from None
    recipe._folder = Path(name).parent if name not in recipe_names() else Path()
    return recipe


def load_limits(path: Path) -> dict[str, float]:
    """The limits that a YAML file names, and no others; the file may be a whole recipe. Raises InputError listing every
    offending key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the limits {path} cannot be read: {error}") from None
    data = _read_yaml(f"the file of limits {path}", text, f"it may name {', '.join(Limits.model_fields)}")
    whole = "name" in data
    try:
        limits = Recipe.model_validate(data).limits if whole else Limits.model_validate(data)
    except ValidationError as error:
        keys = RECIPE_KEYS if whole else tuple(Limits.model_fields)
        raise _refusal(f"the file of limits {path}", error, keys) from None
    return named_limits(limits.model_dump(include=limits.model_fields_set))


def recorded_recipe(fields: dict[str, Any]) -> Recipe:
    """The recipe of a record. Raises InputError listing every offending key."""
    try:
        return Recipe.model_validate({key: value for key, value in fields.items() if key != "digest"})
    except ValidationError as error:
        raise _refusal("the recipe of the record", error) from None


def recorded_limits(what: str, fields: dict[str, Any]) -> dict[str, float]:
    """The limits in the recipe of a record. Raises InputError listing every offending key."""
    try:
        limits = Limits.model_validate({key: fields[key] for key in Limits.model_fields if key in fields})
    except ValidationError as error:
        raise _refusal(what, error, tuple(Limits.model_fields)) from None
    return named_limits(limits.model_dump(include=limits.model_fields_set))


def _read_yaml(what: str, text: str, way_out: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{what} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{what} holds no keys: {way_out}")
    return data


def _refusal(what: str, error: ValidationError, keys: tuple[str, ...] | None = None) -> InputError:
    """`keys`: the keys that may stand there; None: a recipe's."""
    keys = RECIPE_KEYS if keys is None else keys
    problems = []
    places = [[str(part) for part in item["loc"] if part not in _ALIASES] for item in error.errors()]
    for item, place in zip(error.errors(), places, strict=True):
        where = ".".join(place) or "recipe"
        said = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {said.replace('a valid tuple', 'a list')}")
    way_out = f"Known keys: {', '.join(keys)}."
    if any(place[:1] in (["calibration"], ["evaluation"]) for place in places):
        way_out += f" Keys of texts: {', '.join(Texts.model_fields)}."
    return input_error(f"{what} cannot be used:", problems, way_out)


def matches(pattern: str, module: str) -> bool:
    return fnmatchcase(module, pattern)


@cache
def _patterns(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if set(key) & set("*?["))


_GROUPS: dict[str, type[BaseModel]] = {
    "widths": Widths,
    "fit": Fit,
    "quantizer": Method,
    "texts": TextChoice,
    "card": Serving,
    "limits": Limits,
}
# Key of a recipe file -> its group.
_GROUP_OF = {key: group for group, fields in _GROUPS.items() for key in fields.model_fields}
_ALIASES = {f"<{group}>" for group in _GROUPS}
# Every key of a recipe file.
RECIPE_KEYS = (*(key for key in Recipe.model_fields if key not in _GROUPS), *_GROUP_OF)

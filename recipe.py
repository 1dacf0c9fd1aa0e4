"""Recipe: one flat YAML file that says what is quantized, how, on which texts, and within which limits.

The file is flat, so that it can be read aloud; the class groups its keys by subject (core/recipe_groups.py,
core/method.py, core/limits.py). A key has the same name in the file and in its group. An unknown key is an error. So is
a pattern that matches no module, which is found when the recipe meets a model. Reading a recipe loads no torch.
"""

import hashlib
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from .core.errors import InputError, input_error
from .core.json_text import json_text
from .core.limits import Limits, named_limits
from .core.method import PRESETS, Method
from .core.recipe_groups import KEEP, FitKeys, Group, Serving, TextKeys, Texts, Widths
from .core.scheme import GRIDS, Scheme
from .core.shipped_recipes import recipe_names, recipe_text
from .core.yaml_file import parse_yaml

# The keys that a method of bitsandbytes fixes: the package gives no choice.
FIXED = ("bits", "group_size", "symmetric")


class Recipe(Group):
    """A frozen recipe. `model_validate` and `model_dump` take and give the flat keys of the YAML file."""

    # The folder of the recipe file. Relative paths in a recipe start there, so that a recipe travels with its texts.
    _folder: Path = PrivateAttr(default=Path())

    # What the plan, the record and the model card call it.
    name: str
    # Printed by `onecard recipes`.
    description: str
    # The model family that the recipe is for. None: every family.
    family: Literal["deepseek_v3", "llama4", "mixtral", "qwen3_moe"] | None = None
    # Something that the user must know. Printed with the plan and kept in the record.
    note: str | None = None
    # What OUT holds (conversion/export.py). The formats hold the same codes, and bf16 holds what the codes stand for.
    # bitsandbytes has codes of its own and goes with its own methods.
    format: Literal["compressed-tensors", "gptq", "gptq-v2", "bf16", "gguf", "bitsandbytes"] = "compressed-tensors"
    # The dtype that the run computes in. auto: float32 on a CPU, bfloat16 on a GPU.
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Tokens that go through a block at once. Fewer take less memory; sums may round differently.
    batch_tokens: int = Field(default=8192, ge=1)
    # A shard of the emitted files holds no more bytes than this.
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000)

    # The groups. A file stays flat, because no key can be spelled like their aliases.
    widths: Widths = Field(default=Widths(), alias="<widths>")
    fit: FitKeys = Field(default=FitKeys(), alias="<fit>")
    quantizer: Method = Field(default=Method(), alias="<quantizer>")
    texts: TextKeys = Field(default=TextKeys(), alias="<texts>")
    card: Serving = Field(default=Serving(), alias="<card>")
    limits: Limits = Field(default=Limits(), alias="<limits>")

    @model_validator(mode="before")
    @classmethod
    def _grouped(cls, data: Any) -> Any:
        """Sorts flat keys into their groups. Where the recipe leaves out a key, the method's preset fills it in."""
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
        """Keys that contradict each other."""
        if not self.name.isprintable() or not (self.note or "").isprintable():
            raise ValueError("name or note holds control characters")
        self._check_method()
        self._check_widths()
        self._check_texts()
        if self.widths.bits == "fit":
            self._check_fit()
        return self

    def _check_method(self) -> None:
        method = self.quantizer.method
        if (method in GRIDS) != (self.format == "bitsandbytes"):
            raise ValueError(
                f"method {method} and format {self.format} contradict each other: {' and '.join(GRIDS)} write the "
                "format bitsandbytes and no other method does"
            )
        if method in GRIDS:
            own = PRESETS[method] | {"symmetric": True}
            wrong = [f"{key} {own[key]}" for key in FIXED if getattr(self.widths, key) != own[key]]
            if wrong:
                raise ValueError(f"method {method} has {', '.join(wrong)} and no other: leave it out")
            if any(words != KEEP for words in self.widths.schemes.values()):
                raise ValueError(f"method {method} has one width: in `schemes` only '{KEEP}' is possible")
        if self.quantizer.tune_epochs and not self.quantizer.reference_correction:
            raise ValueError("tune_epochs needs reference_correction: tuning learns from the reference stream")

    def _check_widths(self) -> None:
        _ = self.scheme  # a contradiction is refused here
        for words in (*self.widths.schemes.values(), *self.fit.fit_schemes):
            if words != KEEP:
                Scheme.parse(words)
        if not self.widths.quantize_roles:
            raise ValueError("quantize_roles is empty: nothing would be quantized")

    def _check_texts(self) -> None:
        texts = self.texts
        if self.limits.max_flip_rate is not None and not texts.tasks:
            raise ValueError("max_flip_rate needs tasks: without them no answer can flip")
        long_tokens = texts.calibration_long_share * texts.calibration_rows * texts.calibration_row_tokens
        if 0 < long_tokens < texts.calibration_long_row_tokens:
            raise ValueError(
                f"calibration_long_share gives {long_tokens:,.0f} tokens to long rows, and one has "
                f"{texts.calibration_long_row_tokens:,} (calibration_long_row_tokens)"
            )

    def _check_fit(self) -> None:
        if (self.fit.budget_gb is None) == (self.card.gpu is None):
            raise ValueError("bits: fit needs one budget: gpu (with context and sequences) or budget_gb")
        if self.card.engine != "vllm":
            raise ValueError(f"bits: fit mixes widths as vLLM loads them, and engine is {self.card.engine}")
        if self.format != "compressed-tensors":
            raise ValueError(f"bits: fit mixes widths as compressed-tensors holds them, and format is {self.format}")
        if not set(self.fit.fit_schemes) - {KEEP}:
            raise ValueError("fit_schemes names no width: nothing would be quantized")

    @property
    def scheme(self) -> Scheme:
        """The scheme of every module that `schemes` does not mention. With bits: fit, the smallest."""
        widths = self.widths
        bits = 4 if widths.bits == "fit" else widths.bits
        return Scheme(bits, widths.group_size, widths.symmetric, GRIDS.get(self.quantizer.method, "int"))

    def scheme_of(self, role: str, module: str) -> tuple[Scheme | None, list[str]]:
        """The scheme of a module, or None where it stays as it is; and the entries of `schemes` that apply to it."""
        schemes = self.widths.schemes
        scheme = self.scheme if role in self.widths.quantize_roles else None
        # A fitted recipe has thousands of plain names: only patterns are matched.
        patterns = [key for key in _patterns(tuple(schemes)) if matches(key, module)]
        hits = [key for key in (role, *patterns, module) if key in schemes]
        for key in hits:
            scheme = None if schemes[key] == KEEP else Scheme.parse(schemes[key])
        return scheme, hits

    def changed(self, **fields: Any) -> "Recipe":
        """The recipe with other values of these keys, checked again. Raises InputError."""
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
        """Equal keys make equal recipes, wherever their files lie."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json_text(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def load_recipe(name: str | Path) -> Recipe:
    """Read and check a recipe: the name of a shipped one, or the path of a YAML file.

    Raises InputError listing every offending key.
    """
    name = str(name)
    data = parse_yaml(f"the recipe {name}", recipe_text(name), "print one with `onecard recipes demo`")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _refusal(f"the recipe {name}", error) from None
    recipe._folder = Path(name).parent if name not in recipe_names() else Path()
    return recipe


def load_limits(path: Path) -> dict[str, float]:
    """The limits that a YAML file names; defaults do not count. The file may be a whole recipe.

    Raises InputError listing every offending key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the limits {path} cannot be read: {error}") from None
    data = parse_yaml(f"the file of limits {path}", text, f"it may name {', '.join(Limits.model_fields)}")
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


def _refusal(what: str, error: ValidationError, keys: tuple[str, ...] | None = None) -> InputError:
    """What pydantic found, one line for each offending key. `keys` are those that are known; None: a recipe's."""
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
    """Whether a glob pattern of the recipe matches a module name."""
    return fnmatchcase(module, pattern)


@cache
def _patterns(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if set(key) & set("*?["))


_GROUPS: dict[str, type[BaseModel]] = {
    "widths": Widths,
    "fit": FitKeys,
    "quantizer": Method,
    "texts": TextKeys,
    "card": Serving,
    "limits": Limits,
}
# Key of a recipe file -> its group.
_GROUP_OF = {key: group for group, fields in _GROUPS.items() for key in fields.model_fields}
_ALIASES = {f"<{group}>" for group in _GROUPS}
# Every key of a recipe file.
RECIPE_KEYS = (*(key for key in Recipe.model_fields if key not in _GROUPS), *_GROUP_OF)

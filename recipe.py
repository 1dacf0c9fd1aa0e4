"""Recipe: one flat YAML file that says what is quantized, how, on which texts, and what the run may not do.

It can be read aloud. Unknown keys are errors; so is a pattern that matches nothing (found when the recipe meets a
model). Every field has its unit in its name and its reason in its description.
"""

import hashlib
import json
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from .core.errors import InputError, input_error
from .core.method import Method
from .core.scheme import BY_ROW, GRIDS, NF4_BLOCK, Scheme

QuantizableRole = Literal["expert", "shared_expert", "mlp", "attention"]
# Among a recipe's `schemes`, in place of a width: it stays in the source's dtype.
KEEP = "keep"


# What a method is short for: fields that a recipe does not name itself get these values. Times and KL of each stand in
# docs/benchmarks.md; what a field is worth, too.
METHODS: dict[str, dict[str, Any]] = {
    # Round-to-nearest with absmax / 8, no calibration: Meta's own scheme for Scout.
    "rtn": {},
    # bitsandbytes' own quantizers, which are their own format; no calibration either.
    "bnb-nf4": {"format": "bitsandbytes", "bits": 4, "group_size": NF4_BLOCK},
    "bnb-int8": {"format": "bitsandbytes", "bits": 8, "group_size": BY_ROW},
    # GPTQ on statistics taken once for each half of a block, aimed at the reference stream.
    "fast": {
        "sequential": "halves",
        "refine_rounds": 1,
        "tabu_moves": 50,
        "output_blocks": 0,
        "calibration_rows_per_input": 8.0,
    },
    # Statistics site by site, refinement, and Fisher metrics of what errors of outputs cost.
    "balanced": {"refine_rounds": 2, "output_blocks": 8, "token_weighting": "gradient", "tabu_moves": 100},
    # The same with more of each.
    "best": {
        "refine_rounds": 2,
        "output_blocks": 16,
        "token_weighting": "gradient",
        "restarts": 8,
        "tabu_moves": 200,
        "tune_epochs": 4,
    },
}


# What the methods of bitsandbytes say themselves: the package gives no choice.
FIXED = ("bits", "group_size", "symmetric")


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


class Limits(BaseModel):
    """What a finished run is held against: flat fields of a recipe, and the keys of a file for `gate --limits`.

    None, and 0 of `fail_below_expert_rows`: no limit. It is the measured mean that a limit is held against, not an end
    of its interval: the same files on the same texts then always get the same answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    max_kl_mean_nats: float | None = Field(default=None, gt=0)
    max_kl_p99_nats: float | None = Field(default=None, gt=0)
    min_same_top1: float | None = Field(default=None, ge=0, le=1)
    max_flip_rate: float | None = Field(default=None, ge=0, le=1)  # share of items whose answer is another
    max_emitted_bytes: int | None = Field(default=None, ge=1)
    fail_below_expert_rows: int = Field(default=0, ge=0)  # found after each block, and the run stops there
    max_fallbacks: int = Field(default=0, ge=0)  # matrices whose second moment could not be factored; likewise


class Recipe(Limits):
    """A frozen recipe. Field names are the YAML's keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    # What paths in it begin at: the recipe file's own folder, so that a recipe travels with its texts.
    _folder: Path = PrivateAttr(default=Path())

    name: str
    description: str
    family: Literal["deepseek_v3", "llama4", "mixtral", "qwen3_moe"] | None = None  # None: any family
    note: str | None = None  # printed with the plan and kept in the record

    method: Literal["rtn", "bnb-nf4", "bnb-int8", "fast", "balanced", "best"] = "best"
    # What OUT holds (export.py); the codes are the same in all, and bf16 holds what they stand for. bitsandbytes, which
    # has other codes, belongs to its own methods.
    format: Literal["compressed-tensors", "gptq", "gptq-v2", "bf16", "gguf", "bitsandbytes"] = "compressed-tensors"
    # 'fit': for every unit the width of `fit_schemes` that a budget buys the least predicted KL with (fitting.py): what
    # `gpu` leaves for weights, or `budget_gb` of files.
    bits: Literal[4, 8, "fit"] = 4
    fit_schemes: tuple[str, ...] = ("int4 group 128", "int4 group 64", "int4 group 32", "int8 group 128", KEEP)
    budget_gb: float | None = Field(default=None, gt=0)  # decimal GB of safetensors files
    # So many calibration rows, cut to so many tokens, price the units; all others give the statistics: pricing.py
    price_rows: int = Field(default=64, ge=1)
    price_row_tokens: int = Field(default=512, ge=2)
    # The card, and what it is to hold beside the weights. A run that would not fit it is refused (planner/fit.py).
    gpu: str | None = None
    context: int = Field(default=32_768, ge=1)
    sequences: int = Field(default=1, ge=1)
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    engine: Literal["vllm", "transformers", "llama.cpp"] = "vllm"
    engine_batch_tokens: int | None = Field(default=None, ge=16)  # of one pass over prompts; None: the engine's own
    vision: bool = True  # whether the tower is loaded

    group_size: int = 128  # -1: one scale a row
    symmetric: bool = True
    quantize_roles: tuple[QuantizableRole, ...] = ("expert", "shared_expert")
    # What is to have another width than bits, group_size and symmetric say: role, or glob pattern of module names ->
    # 'int8 group 128', 'int4 by row', ..., or 'keep'. A name goes before a pattern, a pattern before a
    # role, and of several patterns the last one counts.
    schemes: dict[str, str] = {}
    keep_modules: tuple[str, ...] = ()  # glob patterns of module names that stay as they are

    scale_search: bool = True
    signed_scales: bool = True  # with scale_search: a group's scale may be negative (quantize/grid.py)
    activation_order: bool = True
    damping: float = Field(default=0.01, gt=0, le=1)
    # tau = shrinkage * inputs rows of the layer's pooled moment join each expert's own: calibration/moments.py
    shrinkage: float = Field(default=0.3, gt=0)
    refine_rounds: int = Field(default=2, ge=0)  # after GPTQ: scales refitted and codes swept, this many times
    # So many tries at each stretch of columns, every row keeping its best, twice over: quantize/restarts.py
    restarts: int = Field(default=0, ge=0, le=64)
    # Then so many moves of a tabu search over the codes of each stretch, twice over: quantize/tabu.py
    tabu_moves: int = Field(default=0, ge=0, le=10_000)
    # What errors of outputs cost is taken into account between this many blocks of rows (quantize/metric.py); 0: not.
    output_blocks: int = Field(default=8, ge=0)
    # How much a token counts in the statistics: alike, by 1 / mean square of the residual row that leaves the block, or
    # by that and the gradients at each site. These, and output metrics, want a walk back: calibration/sensitivity.py
    token_weighting: Literal["none", "residual", "gradient"] = "residual"
    # Aim at the reference stream before rounding, with a ridge of strength * inputs / rows: quantize/correction.py
    reference_correction: bool = True
    correction_strength: float = Field(default=10.0, gt=0)
    # Before they are quantized a feed-forward half's matrices learn its whole output, so often over the rows: tuning.py
    tune_epochs: int = Field(default=0, ge=0, le=64)
    # Aim what stays in the source's dtype too: routers, and attention where it is kept. It costs nothing at run time.
    aim_kept: bool = True
    # Statistics anew for every site that reads what others of its half have changed, or once for each half of a block.
    sequential: Literal["sites", "halves"] = "sites"

    calibration: Texts = Texts()
    calibration_rows: int = Field(default=512, ge=1)
    calibration_row_tokens: int = Field(default=2048, ge=2)
    # Of these no more than give every expert, at an even share, so many rows for each of its inputs; 0: all of them.
    calibration_rows_per_input: float = Field(default=0.0, ge=0)
    calibration_seed: int = 0
    # A share of the calibration tokens in rows of this length, so that attention in chunks sees more than one.
    calibration_long_share: float = Field(default=0.0, ge=0, le=1)
    calibration_long_row_tokens: int = Field(default=16384, ge=2)
    # So many rows are packed for each that is wanted, and one pass chooses those that feed the experts with the
    # fewest (calibration/balance.py); 1: no pass. The random share of the rows is drawn as if there were none.
    calibration_pool: float = Field(default=1.0, ge=1, le=64)
    calibration_random_share: float = Field(default=0.5, ge=0, le=1)
    warn_below_expert_rows: int = Field(default=256, ge=0)

    evaluation: Texts = Texts(split="test")
    evaluation_rows: int = Field(default=128, ge=1)
    evaluation_row_tokens: int = Field(default=2048, ge=2)
    # Multiple-choice items that both models answer when the result is verified (tasks.py): `demo`, mmlu, ..., or files.
    tasks: tuple[str, ...] = ()
    task_shots: int = Field(default=0, ge=0, le=32)
    task_items: int | None = Field(default=None, ge=1)  # of each task so many, drawn by a seed; None: all

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on a CPU, bfloat16 on a GPU
    batch_tokens: int = Field(default=8192, ge=1)
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000)

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        method = data.get("method", cls.model_fields["method"].default) if isinstance(data, dict) else None
        return METHODS.get(method, {}) | data if isinstance(method, str) else data

    @model_validator(mode="after")
    def _sound(self) -> "Recipe":
        if (self.method in GRIDS) != (self.format == "bitsandbytes"):
            raise ValueError(
                f"method {self.method} and format {self.format} contradict each other: bitsandbytes quantizes by its "
                f"own functions, so that {' and '.join(GRIDS)} are the methods of its format and of no other"
            )
        if self.method in GRIDS:
            own = METHODS[self.method] | {"symmetric": True}
            wrong = [f"{key} {own[key]}" for key in FIXED if getattr(self, key) != own[key]]
            if wrong:
                raise ValueError(f"method {self.method} has {', '.join(wrong)} and no other: leave it out")
            if any(words != KEEP for words in self.schemes.values()):
                raise ValueError(f"method {self.method} knows one width: `schemes` may say '{KEEP}' and no more")
        _ = self.scheme  # refuses what contradicts itself
        for words in (*self.schemes.values(), *self.fit_schemes):
            if words != KEEP:
                Scheme.parse(words)
        if self.bits == "fit":
            self._sound_fit()
        if not self.name.isprintable() or not (self.note or "").isprintable():
            raise ValueError("name or note holds control characters")
        if self.max_flip_rate is not None and not self.tasks:
            raise ValueError("max_flip_rate needs tasks: no answer would be looked at")
        if not self.quantize_roles:
            raise ValueError("quantize_roles is empty: nothing would be quantized")
        if self.tune_epochs and not self.reference_correction:
            raise ValueError("tune_epochs needs reference_correction: there is nothing else to learn from")
        long_tokens = self.calibration_long_share * self.calibration_rows * self.calibration_row_tokens
        if 0 < long_tokens < self.calibration_long_row_tokens:
            raise ValueError(
                f"calibration_long_share gives {long_tokens:,.0f} tokens to long rows, and one has "
                f"{self.calibration_long_row_tokens:,} (calibration_long_row_tokens)"
            )
        return self

    def _sound_fit(self) -> None:
        if (self.budget_gb is None) == (self.gpu is None):
            raise ValueError("bits: fit needs a budget: gpu (with context and sequences) or budget_gb, one of them")
        if self.engine != "vllm":
            raise ValueError(f"bits: fit mixes widths as vLLM loads them, and engine is {self.engine}")
        if self.format != "compressed-tensors":
            raise ValueError(f"bits: fit mixes widths as compressed-tensors holds them, and format is {self.format}")
        if not set(self.fit_schemes) - {KEEP}:
            raise ValueError("fit_schemes names no width: nothing would be quantized")

    @property
    def scheme(self) -> Scheme:
        """What every module gets that `schemes` says nothing of; of a recipe that is yet to be fitted, the least."""
        bits = 4 if self.bits == "fit" else self.bits
        return Scheme(bits, self.group_size, self.symmetric, GRIDS.get(self.method, "int"))

    def scheme_of(self, role: str, module: str) -> tuple[Scheme | None, list[str]]:
        """The scheme of a module, None where it stays as it is; and the entries of `schemes` that mean it."""
        scheme = self.scheme if role in self.quantize_roles else None
        # Names as they are, of which a fitted recipe has thousands, need no matching.
        patterns = [key for key in _patterns(tuple(self.schemes)) if matches(key, module)]
        hits = [key for key in (role, *patterns, module) if key in self.schemes]
        for key in hits:
            scheme = None if self.schemes[key] == KEEP else Scheme.parse(self.schemes[key])
        return scheme, hits

    def changed(self, **fields: Any) -> "Recipe":
        """The recipe with other values of some fields, checked anew. Raises InputError."""
        try:
            made = Recipe.model_validate(self.model_dump() | fields)
        except ValidationError as error:
            raise _refusal(f"the recipe {self.name}, as it was changed,", error, Recipe) from None
        made._folder = self._folder
        return made

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


def load_recipe(name: str) -> Recipe:
    """Read and check a recipe. Raises InputError listing every offending key."""
    data = _read_yaml(f"the recipe {name}", recipe_text(name), "print one with `onecard recipes demo`")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _refusal(f"the recipe {name}", error, Recipe) from None
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
    model = Recipe if "name" in data else Limits
    try:
        limits = model.model_validate(data)
    except ValidationError as error:
        raise _refusal(f"the file of limits {path}", error, model) from None
    return named_limits(limits.model_dump(include=limits.model_fields_set))


def named_limits(fields: dict[str, Any]) -> dict[str, float]:
    """Of a recipe's fields (or a record's) those that limit something."""
    found = {key: fields[key] for key in Limits.model_fields if fields.get(key) is not None}
    return {key: value for key, value in found.items() if key != "fail_below_expert_rows" or value > 0}


def recorded_recipe(fields: dict[str, Any]) -> Recipe:
    """The recipe of a record. Raises InputError listing every offending key."""
    try:
        return Recipe.model_validate({key: value for key, value in fields.items() if key != "digest"})
    except ValidationError as error:
        raise _refusal("the recipe of the record", error, Recipe) from None


def recorded_limits(what: str, fields: dict[str, Any]) -> dict[str, float]:
    """The limits in the recipe of a record. Raises InputError listing every offending key."""
    try:
        limits = Limits.model_validate({key: fields[key] for key in Limits.model_fields if key in fields})
    except ValidationError as error:
        raise _refusal(what, error, Limits) from None
    return named_limits(limits.model_dump(include=limits.model_fields_set))


def _read_yaml(what: str, text: str, way_out: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{what} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{what} holds no keys: {way_out}")
    return data


def _refusal(what: str, error: ValidationError, model: type[Limits]) -> InputError:
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        said = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {said.replace('a valid tuple', 'a list')}")
    way_out = f"Known keys: {', '.join(model.model_fields)}."
    if any(item["loc"][:1] in (("calibration",), ("evaluation",)) for item in error.errors()):
        way_out += f" Keys of texts: {', '.join(Texts.model_fields)}."
    return input_error(f"{what} cannot be used:", problems, way_out)


def matches(pattern: str, module: str) -> bool:
    return fnmatchcase(module, pattern)


@cache
def _patterns(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if set(key) & set("*?["))


# Methods that look at weights alone.
UNCALIBRATED = ("rtn", *GRIDS)


def method_of(recipe: Recipe) -> Method:
    """The recipe's words for quantize/."""
    return Method(
        recipe.method if recipe.method in UNCALIBRATED else "gptq",
        recipe.scale_search,
        recipe.signed_scales,
        recipe.damping,
        recipe.activation_order,
        recipe.refine_rounds,
        recipe.restarts,
        recipe.tabu_moves,
        recipe.output_blocks,
    )


def walks_back(recipe: Recipe, method: Method) -> bool:
    """Whether the calibration rows go through the model and back before the first block is quantized."""
    return method.needs_statistics and (method.output_metric or recipe.token_weighting == "gradient")

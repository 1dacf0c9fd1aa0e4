"""The groups of a recipe's keys: widths, the fit of widths to a budget, the texts, and the card that serves the result.

A recipe file is flat, and each key has the same name in its group here. method.py and limits.py hold two more groups;
recipe.py puts them together.
"""

from datetime import date
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

QuantizableRole = Literal["expert", "shared_expert", "mlp", "attention"]
# A width in `schemes` and `fit_schemes`: the weight stays in the source's dtype.
KEEP = "keep"


class Group(BaseModel):
    """Keys of a recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Widths(Group):
    """Which weights get which width."""

    # Bits of a weight. fit: each unit gets the width of `fit_schemes` that gives the least predicted KL within the
    # budget (bits/fitting.py).
    bits: Literal[4, 8, "fit"] = 4
    # How many weights share a scale; -1: one scale a row.
    group_size: int = 128
    # False: each group has a zero point as well.
    symmetric: bool = True
    # The roles that are quantized. Everything else stays in the source's dtype.
    quantize_roles: tuple[QuantizableRole, ...] = ("expert", "shared_expert")
    # Exceptions: a role, a module name or a glob pattern of names -> 'int8 group 128', 'int4 by row', ... or 'keep'.
    # A name wins over a pattern, a pattern over a role, a later pattern over an earlier one.
    schemes: dict[str, str] = {}
    # Glob patterns of module names that stay as they are, byte for byte.
    keep_modules: tuple[str, ...] = ()


class FitKeys(Group):
    """bits: fit. The widths to choose from, the budget, and the rows that measure prices."""

    # The widths that every unit is priced at.
    fit_schemes: tuple[str, ...] = ("int4 group 128", "int4 group 64", "int4 group 32", "int8 group 128", KEEP)
    # Budget of safetensors files in decimal GB. None: what `gpu` leaves for weights.
    budget_gb: float | None = Field(default=None, gt=0)
    # How many calibration rows measure the prices. The other rows give the statistics.
    price_rows: int = Field(default=64, ge=1)
    # The length to which those rows are cut, in tokens.
    price_row_tokens: int = Field(default=512, ge=2)


class TextSource(Group):
    """One source of texts. Where its columns have the usual names, `source` is enough (calibration/columns.py)."""

    # demo, a file or folder (its path starts at the recipe's own folder), or a Hugging Face data set.
    source: str = Field(default="demo", min_length=1)
    # Configuration and split of a data set.
    config: str | None = None
    split: str = "train"
    # The column that holds a text or a conversation.
    column: str | None = None
    # The columns of a question and its answer, in place of `column`.
    prompt_column: str | None = None
    response_column: str | None = None
    # The keys of a message: who speaks, and what is said.
    role_key: str | None = None
    content_key: str | None = None
    # The column that holds the pictures.
    image_column: str | None = None
    # What the record calls these texts. None: each row's own kind.
    kind: str | None = Field(default=None, pattern=r"^[\w-]{1,32}$")
    # The share of a mixture's tokens, relative to the other sources' weights.
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _sound(self) -> "TextSource":
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column go together: give both or neither")
        if self.prompt_column is not None and self.column is not None:
            raise ValueError("column and prompt_column contradict each other: give one of them")
        return self


class Texts(TextSource):
    """One source, or a mixture of several."""

    # The sources of a mixture, in place of all keys above.
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


class TextKeys(Group):
    """Which texts calibrate and which evaluate, and how many of them."""

    # The texts that the statistics are taken on.
    calibration: Texts = Texts()
    # Rows of calibration texts, at most, and the tokens of each.
    calibration_rows: int = Field(default=512, ge=1)
    calibration_row_tokens: int = Field(default=2048, ge=2)
    # Stop after this many calibration rows per input dimension, counted for an evenly loaded expert. 0: never.
    calibration_rows_per_input: float = Field(default=0.0, ge=0)
    # But not before rows hold this many tokens: fewer are too few documents, however small the model.
    calibration_least_tokens: int = Field(default=0, ge=0)
    # What a chat template that asks for today's date is told. None: the day on which the run begins.
    template_date: date | None = None
    # Seeds the order of documents and the choice among them.
    calibration_seed: int = 0
    # The share of calibration tokens that goes into long rows, so that chunked attention sees more than one chunk.
    calibration_long_share: float = Field(default=0.0, ge=0, le=1)
    # Tokens of a long row.
    calibration_long_row_tokens: int = Field(default=16384, ge=2)
    # Pack this many times the rows that are used; one pass over them chooses those that feed starved experts
    # (calibration/balance.py). 1: use all, without that pass.
    calibration_pool: float = Field(default=1.0, ge=1, le=64)
    # The share of the pool's chosen rows that is drawn at random instead.
    calibration_random_share: float = Field(default=0.5, ge=0, le=1)
    # Warn of every expert that sees fewer calibration rows (tokens routed to it).
    warn_below_expert_rows: int = Field(default=256, ge=0)

    # The texts that KL is measured on. They share no document with the calibration texts.
    evaluation: Texts = Texts(split="test")
    # Rows of evaluation texts, at most, one document each, and the tokens to which each is cut.
    evaluation_rows: int = Field(default=128, ge=1)
    evaluation_row_tokens: int = Field(default=2048, ge=2)
    # Multiple-choice tasks that both models answer during verification (eval/tasks.py): demo, mmlu, ..., or files.
    tasks: tuple[str, ...] = ()
    # Examples shown before each question.
    task_shots: int = Field(default=0, ge=0, le=32)
    # Items of each task, drawn by a seed. None: all.
    task_items: int | None = Field(default=None, ge=1)


class Serving(Group):
    """The card, and what it must hold beside the weights. A run that would not fit it is refused (planner/fit.py)."""

    # One of planner/cards.py, or several of one kind: 2xl40s. None: no card is planned for.
    gpu: str | None = None
    # Tokens of each sequence, prompt and answer together.
    context: int = Field(default=32_768, ge=1)
    # Sequences at once.
    sequences: int = Field(default=1, ge=1)
    # The dtype of the KV cache.
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    # The program that serves the model.
    engine: Literal["vllm", "transformers", "llama.cpp"] = "vllm"
    # Tokens of one pass over prompts. None: the engine's own default.
    engine_batch_tokens: int | None = Field(default=None, ge=16)
    # Whether the vision tower is loaded.
    vision: bool = True

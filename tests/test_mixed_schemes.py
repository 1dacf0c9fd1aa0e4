"""Several schemes in one checkpoint: the files hold the widths of the recipe's `schemes`.

The format's own package, asked module by module as an engine asks it, reads the weights that we read. transformers 5.23
cannot serve as the judge: it takes one scheme for all experts and one for all other matrices. vLLM chooses layer by
layer.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from safetensors.torch import load_file

from onecard.checkpoint.model import open_model
from onecard.checkpoint.packed import PackedSource
from onecard.core.scheme import BY_ROW, Scheme

ROLES = ["expert", "shared_expert", "mlp", "attention"]
SCHEMES = {
    "attention": "int8 by row",
    "*.layers.1.*.experts.*": "int8 group 16",
    "*.layers.0.*.shared_expert.down_proj": "int8 group 32",
    "*.layers.1.self_attn.o_proj": "int4 group 16",
    "*.layers.1.*.shared_expert.down_proj": "keep",
}


def by_hand(module: str) -> Scheme | None:
    if ".experts." in module:
        return Scheme(8, 16) if ".layers.1." in module else Scheme(4, 32)
    if module.endswith("o_proj"):
        return Scheme(4, 16) if ".layers.1." in module else Scheme(8, BY_ROW)
    if module.endswith("shared_expert.down_proj"):
        return None if ".layers.1." in module else Scheme(8, 32)
    return Scheme(8, BY_ROW) if ".self_attn." in module else Scheme(4, 32)


def modules_named(names: list[str]) -> torch.nn.Module:
    """A model with a Linear at each of these names."""
    model = torch.nn.Module()
    for name in names:
        owner = model
        for part in name.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(name.rpartition(".")[2], torch.nn.Linear(32, 32, device="meta"))
    return model


@pytest.mark.parametrize("method", ["rtn", "fast"])
def test_what_the_recipe_says_is_what_the_formats_own_package_reads(
    method: str,
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    use, out = recipe(method=method, quantize_roles=ROLES, schemes=SCHEMES), tmp_path / "out"
    planned = onecard("plan", baby("scout"), "--recipe", use)
    made = onecard("quantize", baby("scout"), out, "--recipe", use, *texts)
    assert made.exit_code == 0, made.stderr
    files = sorted(out.glob("*.safetensors"))
    assert json.loads(planned.stdout)["emitted_bytes"] == sum(file.stat().st_size for file in files)
    checked = onecard("check", out)
    assert checked.exit_code == 0, checked.stderr

    model = open_model(str(out))
    assert isinstance(model.source, PackedSource)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    modules = [module for block in range(2) for _, module, _, _ in model.adapter.modules(block)]
    linears = modules_named(modules)
    apply_quantization_config(
        linears, QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    )
    seen = set()
    for module in modules:
        wanted = by_hand(module)
        seen.add(wanted)
        scheme = getattr(linears.get_submodule(module), "quantization_scheme", None)
        if wanted is None:
            assert scheme is None
            assert f"{module}.weight" in tensors
            continue
        args: Any = scheme.weights
        assert (args.num_bits, args.group_size or BY_ROW, args.symmetric) == (
            wanted.bits,
            wanted.group_size,
            wanted.symmetric,
        ), module
        stored = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.weight_")}
        theirs = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert torch.equal(theirs, model.source.get(f"{module}.weight")), module
        assert model.source.schemes[module] == str(wanted)
    assert len(seen) == 6


def test_transformers_is_not_asked_to_load_what_it_would_unpack_wrongly(
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    onecard: Callable[..., Result],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """5.23 silently gives every matrix outside the experts the first group's width."""
    use, out = recipe(method="rtn", quantize_roles=ROLES, schemes={"attention": "int8 group 32"}), tmp_path / "out"
    assert onecard("quantize", baby("scout"), out, "--recipe", use, *texts).exit_code == 0
    answered = onecard("generate", out, "hello")
    assert answered.exit_code == 2
    assert "export --format bf16" in answered.stderr
    checked = onecard("check", out, "--engine", "transformers")
    assert checked.exit_code == 1
    assert "no group names the experts" in checked.stderr
    assert onecard("check", out, "--engine", "vllm").exit_code == 0


@pytest.mark.parametrize(
    ("schemes", "needles"),
    [
        ({"attention": "int5 group 32"}, ["int5 group 32", "int4 group 128"]),
        ({"*.nowhere.*": "int8 group 32"}, ["*.nowhere.*", "shared_expert"]),
        ({"*.experts.3.*": "int8 group 32"}, ["experts.3.gate_proj is int8 group 32", "need one scheme"]),
        ({"*.q_proj": "int8 group 32"}, ["self_attn.qkv_proj", "kept"]),
        ({"expert": "int8 group 40"}, ["group_size 40 does not divide the 64 inputs"]),
        ({"expert": "keep", "shared_expert": "keep", "mlp": "keep"}, ["keeps every module"]),
    ],
    ids=["no scheme", "matches nothing", "one expert", "q alone", "does not divide", "keeps all"],
)
def test_schemes_that_cannot_be_used(
    schemes: dict[str, str],
    needles: list[str],
    baby: Callable[..., Path],
    recipe: Callable[..., Path],
    refuse: Callable[..., str],
) -> None:
    refuse(baby("scout"), *needles, use=recipe(schemes=schemes))

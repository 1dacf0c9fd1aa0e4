"""onecard packs a mixture-of-experts model onto one GPU and proves how far the result is from the original.

The names of the Python API (docs/api.md) are loaded when they are first used, so that `import onecard` costs nothing.

`onecard.quantize` is the function, although a subpackage has that name: importing the subpackage makes Python bind it
to the attribute, and `_Package` keeps the function there. `from onecard.quantize.gptq import gptq` works as ever;
`import onecard.quantize.gptq as x` is the one spelling that cannot, because it goes by the attribute.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import check as check
    from .api import export as export
    from .api import flips as flips
    from .api import gate as gate
    from .api import inspect as inspect
    from .api import plan as plan
    from .api import quantize as quantize
    from .api import verify as verify
    from .core.errors import OnecardError as OnecardError
    from .eval.lm_eval_model import open_twin as open_twin
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe

__version__ = "0.1.0"

# Name -> the module that holds it. Those outside `api` need no torch.
_HOMES = {
    **dict.fromkeys(("check", "export", "flips", "gate", "inspect", "plan", "quantize", "verify"), "onecard.api"),
    "load_recipe": "onecard.recipe",
    "Recipe": "onecard.recipe",
    "OnecardError": "onecard.core.errors",
    "open_twin": "onecard.eval.lm_eval_model",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "quantize" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Before the other libraries are imported, which read their variables only then.
    import_module("onecard.core.libraries").quiet_libraries()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""The recipes that ship with the package, and the text of any recipe. Needs nothing but the standard library.

So a mistyped name is refused, and names complete in the shell, before pydantic and YAML are loaded.
"""

from importlib import resources
from pathlib import Path

from .errors import InputError

_FOLDER = f"{__package__.partition('.')[0]}.recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in resources.files(_FOLDER).iterdir() if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe or of a file. Raises InputError."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the recipe {name} cannot be read: {error}") from None
    if name not in recipe_names():
        raise InputError(f"there is no recipe {name!r}: {', '.join(recipe_names())}, or the path of a .yaml file")
    return (resources.files(_FOLDER) / f"{name}.yaml").read_text(encoding="utf-8")

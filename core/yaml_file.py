"""YAML as a user means it: a key that stands twice in a mapping is a mistake, and a file must hold keys."""

from typing import Any

import yaml

from .errors import InputError


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} stands there twice")
        return super().construct_mapping(node, deep)


def parse_yaml(what: str, text: str, way_out: str) -> dict[str, Any]:
    """The mapping in a YAML text. `what` names the file in messages. Raises InputError."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{what} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{what} holds no keys: {way_out}")
    return data

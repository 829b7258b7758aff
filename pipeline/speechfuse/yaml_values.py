"""Values of YAML, in files and on the command line.

In: YAML 1.2, and 1_000. Out: Python's values. The words yes, no, on and off, 007, 12:30 and
2024-01-01 are text, which YAML 1.1 reads as booleans, octal, sexagesimal and a date. Where a job
declares text, 1.10 is the text "1.10". A key that comes twice is an error. A value may be taken
from another file: ${file:PATH,KEY}.
"""

import dataclasses
import difflib
import re
import typing
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf._yaml import get_yaml_loader

YES_OR_NO = {"yes": True, "on": True, "no": False, "off": False}  # for what is declared a boolean
_FILE = re.compile(r"\$\{file:([^,}]+),([^}]+)\}")
_TAG = "tag:yaml.org,2002:"
_SCALARS = {  # first characters, pattern
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)"),
    "float": (
        "-+0123456789.",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
    ),
}
_Safe: Any = get_yaml_loader()  # of OmegaConf: it also refuses endless aliases


class _Yaml(_Safe):
    yaml_implicit_resolvers: typing.ClassVar = {
        first: [each for each in resolvers if each[0].removeprefix(_TAG) not in _SCALARS]
        for first, resolvers in _Safe.yaml_implicit_resolvers.items()
    }


class _AsSpelled(_Yaml):
    """Reads numbers and booleans as text too."""


for _name, (_first, _pattern) in _SCALARS.items():
    _Yaml.add_implicit_resolver(_TAG + _name, re.compile(f"^({_pattern})$"), list(_first))
    _AsSpelled.add_constructor(_TAG + _name, _AsSpelled.construct_scalar)
_AsSpelled.yaml_implicit_resolvers = _Yaml.yaml_implicit_resolvers


def parse(text: str, hint: Any = None) -> Any:
    """Return the value of one YAML document; of numbers and booleans the spelling, where `hint`, a
    type, declares text. Raises yaml.YAMLError for what is none."""
    return _declared(_Yaml(text).get_single_data(), _AsSpelled(text).get_single_data(), hint)


def _declared(value: Any, spelled: Any, hint: Any) -> Any:
    of_hint = typing.get_args(hint)
    if isinstance(value, dict):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        pairs = zip(value.items(), spelled.values(), strict=True)
        return {key: _declared(inner, text, hints.get(key)) for (key, inner), text in pairs}
    if isinstance(value, list):
        of_each = of_hint[0] if of_hint else None
        return [_declared(*pair, of_each) for pair in zip(value, spelled, strict=True)]
    return spelled if isinstance(value, int | float) and str in (hint, *of_hint) else value


def read(path: str | Path, hint: Any = None) -> Any:
    """Return the value of a YAML file, as `parse`. Raises FileNotFoundError where there is none."""
    try:
        return parse(Path(path).read_text("utf-8"), hint)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def settings(path: Path, schema: Any = None) -> dict[str, Any]:
    """Return the settings in a YAML file, for a job of `schema`. Raises FileNotFoundError, which
    says what there is, when there is no such file, and ValueError when it holds no mapping."""
    folder, recipes = path.parent, path.parent.parent
    if not path.exists() and recipes.name == "recipes" and folder.is_dir():
        if others := ", ".join(map(str, sorted(recipes.glob(f"*/{path.name}")))):
            raise FileNotFoundError(f"{path}: No such file; copy that of another recipe: {others}")
        there = [each.name for each in folder.glob("*.yaml")]
        close = difflib.get_close_matches(path.name, there, n=1)
        guess = f"did you mean {folder / close[0]}?" if close else "no recipe has one to copy"
        raise FileNotFoundError(f"{path}: No such file; {guess}")
    if not path.exists() and recipes.name == "recipes":
        names = ", ".join(sorted({each.parent.name for each in recipes.glob("*/*.yaml")}))
        raise FileNotFoundError(f"there is no recipe {folder.name} for just recipe=NAME: {names}")
    values = read(path, schema) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a configuration is a mapping of keys to values")
    return values


def with_files(value: Any) -> Any:
    """Return `value` with every string ${file:PATH,KEY} in it replaced by what the YAML file PATH
    has at the dotted KEY. Raises ValueError when that file has no such key."""
    if isinstance(value, dict):
        return {key: with_files(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return list(map(with_files, value))
    if not isinstance(value, str) or not (named := _FILE.fullmatch(value)):
        return value
    path, key = named.groups()
    content = OmegaConf.select(OmegaConf.create(read(path)), key)
    if content is None:
        raise ValueError(f"{path} has no key '{key}'")
    return OmegaConf.to_container(content) if OmegaConf.is_config(content) else content

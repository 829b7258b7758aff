"""Components: classes and functions that a configuration names by dotted path.

In: `{_component_: dotted.path, ...}` from a recipe. Out: what it names, called with the other keys,
which are checked against its signature first. A package lists short names in COMPONENTS.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import sys
import sysconfig
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt, Predicate

from speechfuse import yaml_values

# types of arguments with the bounds that `bind` holds values of a configuration to
Count = Annotated[int, Ge(1)]
Batch = Annotated[int, Ge(1), Le(1 << 16)]
OpenShare = Annotated[float, Gt(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
_ORDERED = Predicate(lambda pair: pair[0] <= pair[1])
_Decibel = Annotated[float, Ge(-200), Le(200)]
Decibels = Annotated[tuple[_Decibel, _Decibel], _ORDERED]
PositiveRange = Annotated[tuple[Positive, Positive], _ORDERED]
_Seconds = Annotated[float, Gt(0), Le(60)]  # of an augmentation
SecondsRange = Annotated[tuple[_Seconds, _Seconds], _ORDERED]
ShareRange = Annotated[tuple[Share, Share], _ORDERED]


def instantiate(spec: dict[str, Any], **extra: Any) -> Any:
    """Call what `spec["_component_"]` names with the rest of `spec` and with `extra` as keywords.

    `extra` is what the job itself passes, so `spec` may not also set it. Raises ValueError as
    `bind` does; errors of the component itself pass through.
    """
    return bind(spec, *extra)(**extra)


def bind(spec: dict[str, Any], *names: str) -> Callable[..., Any]:
    """Return a partial of what `spec["_component_"]` names, with the rest of `spec` as keywords.

    The caller passes the keywords `names` when it calls the partial; the check of the keywords is
    done here, once, so the partial may be called for every row. The dotted path may lead through a
    class: `speechfuse.quantizer.model.Quantizer.load`. Raises ValueError for a path that cannot be
    imported, for a keyword that the component does not take, for a required one that is missing,
    for one of `names` that `spec` sets and, if the component belongs to speechfuse, for a value of
    `spec` that is not of the declared type, out of its bounds, an empty text or no finite number.
    """
    arguments = dict(spec)
    dotted = arguments.pop("_component_", None)
    if not isinstance(dotted, str):
        raise ValueError(f"_component_ is missing from {spec}: give the dotted path to call")
    component = resolve(dotted)
    if both := sorted(arguments.keys() & set(names)):
        raise ValueError(f"{dotted}: the job itself sets {', '.join(both)}; remove from the config")
    try:
        parameters = inspect.signature(component).parameters.values()
    except ValueError:  # some builtins have no signature; then the call itself is the check
        return partial(component, **arguments)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    passed = [*arguments, *names]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in passed:
            if name not in named:
                raise ValueError(f"{dotted}: unknown argument '{name}'{nearest(name, named)}")
    if required := [n for n, p in named.items() if p.default is p.empty and n not in passed]:
        raise ValueError(
            f"{dotted}: no value for required {', '.join(required)}; add it beside _component_"
        )
    function = component.__init__ if inspect.isclass(component) else component
    hints: dict[str, Any] = {}
    plain: dict[str, Any] = {}  # without bounds
    ours = dotted.startswith(f"{__package__}.")
    with contextlib.nullcontext() if ours else contextlib.suppress(Exception):
        plain = typing.get_type_hints(function)
        hints = typing.get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        hint = hints.get(name, Any)
        default = named[name].default if name in named else None
        if default not in (math.inf, -math.inf) or value != value:
            refuse_not_finite(f"{dotted}: {name}", value)
        if ours:
            _refuse_empty(dotted, name, value, hint, default)
            arguments[name] = _fitting(dotted, name, value, hint, plain.get(name, Any))
        elif str not in (hint, *typing.get_args(hint)):  # others' annotations are often inexact
            arguments[name] = _mapped(value, _as_bool)
    return partial(component, **arguments)


def modules_of(spec: Any) -> set[str]:
    """Return the names of the modules that define the components of `spec`, at any depth."""
    if isinstance(spec, dict):
        dotted = spec.get("_component_")
        own = {resolve(dotted).__module__} if isinstance(dotted, str) else set()
        return own.union(*map(modules_of, spec.values()))
    return set().union(*map(modules_of, spec)) if isinstance(spec, list | tuple) else set()


def _fitting(dotted: str, name: str, value: Any, hint: Any, plain: Any) -> Any:
    """Return the reading of a value from YAML that is of the type `hint`: a whole number may be
    text, and yes and no may be booleans. Raises ValueError where none is; `plain` is the type that
    it names, without bounds."""
    for reading in (value, _mapped(value, _as_text), _mapped(value, _as_bool)):
        if not (faults := _faults(reading, hint)):
            return reading
        for kind, message in faults.items():
            if kind == "predicate_failed":
                raise ValueError(f"{dotted}: {name}={value!r}: give a range, [least, most]")
            if kind.startswith(("greater_than", "less_than")):
                should = message.replace("Input", "it")
                raise ValueError(f"{dotted}: {name}={value!r}: {should}")
    quotes = "; write text in quotes" if isinstance(value, bool | float) else ""
    shown = inspect.formatannotation(plain)
    raise ValueError(f"{dotted}: {name}={value!r} is not of the type {shown}{quotes}")


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, function) for key, inner in value.items()}
    return [_mapped(v, function) for v in value] if isinstance(value, list) else function(value)


def _refuse_empty(dotted: str, name: str, value: Any, hint: Any, default: Any) -> None:
    """Raise ValueError for an empty text where one is declared: as a path it is the current folder,
    which nobody means. A key whose default is an empty text may be empty."""
    among = isinstance(value, list) and str in typing.get_args(hint)  # str | list[str]
    texts = [each for each in (value if among else [value]) if isinstance(each, str)]
    if default != "" and not all(map(str.strip, texts)):
        raise ValueError(f"{dotted}: {name} is empty: give it a value, or leave it out")


def refuse_not_finite(what: str, value: Any) -> None:
    """Raise ValueError for NaN or infinity in a value from YAML, but for the arguments of
    components in it, which `bind` checks."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what}=.{value!s}: a finite number is needed".replace(".-", "-."))
    if isinstance(value, dict) and "_component_" not in value:
        value = [*value.values()]
    for each in value if isinstance(value, list) else ():
        refuse_not_finite(what, each)


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_bool(value: Any) -> Any:
    return yaml_values.YES_OR_NO.get(value.lower(), value) if isinstance(value, str) else value


def _faults(value: Any, hint: Any) -> dict[str, str]:
    """Return why a value from YAML is not of the type `hint`, by kind of fault. Returns none for a
    type that pydantic does not know: YAML has no way to write a value of it."""
    from pydantic import TypeAdapter, ValidationError  # here, as it takes 0.2 s
    from pydantic.errors import PydanticSchemaGenerationError

    try:  # in JSON a list passes for a tuple and an int for a float, but no bool for a number
        TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except PydanticSchemaGenerationError:
        return {}
    except ValidationError as error:
        return {fault["type"]: fault["msg"] for fault in error.errors()}
    return {}


def resolve(dotted: str) -> Any:
    """Return the class or function at a dotted path. Raises ValueError when there is none."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            value = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # a shorter path is tried only if this one is no module, not if an import in it fails
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ValueError(
                    f"{dotted}: {name} needs the module {error.name}, which is not installed here"
                ) from error
            continue
        names = getattr(value, "COMPONENTS", {})  # short names that the package lists
        if parts[cut] in names:
            return resolve(".".join([name, names[parts[cut]], *parts[cut + 1 :]]))
        for part in parts[cut:]:
            if not hasattr(value, part):
                names = [*names, *(public for public in dir(value) if not public.startswith("_"))]
                close = difflib.get_close_matches(part, names, n=1)
                guess = f"; did you mean '{close[0]}'?" if close else ""
                raise ValueError(f"_component_ {dotted}: {name} has no '{part}'{guess}")
            value = getattr(value, part)
        if not callable(value):
            raise ValueError(f"_component_ {dotted} is not a class or a function")
        return value
    raise ValueError(
        f"_component_ {dotted}: there is no module '{parts[0]}'; give the full dotted "
        "path, e.g. speechfuse.quantizer.model.Quantizer.load"
    )


def nearest(key: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'x'? Allowed here: ..." for the last part of a dotted `key`."""
    prefix, dot, last = key.rpartition(".")
    names = list(names)
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
    guess = f"; did you mean '{prefix}{dot}{close[0]}'?" if close else "."
    return f"{guess} Allowed here: {', '.join(names) or 'none'}"


def code_digest(modules: Iterable[str]) -> str:
    """Return a hash of the source files of imported `modules`, and of the user's own modules that
    they import, at any depth; an edit of any of them changes it."""
    files, waiting = dict[str, str | None](), [*modules]
    while waiting:
        if (name := waiting.pop()) not in files:
            files[name] = getattr(sys.modules[name], "__file__", None)  # None: built in
            waiting += filter(_is_users, _imports(name) if _is_users(name) else ())
    contents = (Path(file).read_bytes() for file in files.values() if file)
    hashes = {hashlib.sha256(content).hexdigest() for content in contents}
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def _imports(name: str) -> Iterator[str]:
    """Yield the names of what a module imports; `from a import b` gives a and a.b."""
    module = sys.modules[name]
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dotted = "." * node.level + (node.module or "")
            of = importlib.util.resolve_name(dotted, module.__package__)
            yield from (of, *(f"{of}.{alias.name}" for alias in node.names))


def _is_users(name: str) -> bool:
    """Return whether `name` is an imported module that is neither installed nor of speechfuse."""
    file = str(getattr(sys.modules.get(name), "__file__", None))
    ours = {Path(__file__).parent, *map(Path, sysconfig.get_paths().values())}
    return file.endswith(".py") and ours.isdisjoint(Path(file).parents)

"""Configuration of every job: dataclass defaults < YAML file < key=value overrides.

In: a dataclass (the schema), a YAML file, and overrides such as `quantizer.window=5`. Out: an
instance of the dataclass, every key known and every value of its declared type. A job is run as

    python -m stages.<job> config.yaml key=value ...

(without a file: python -m stages.<job> key=value ...) and its module ends with
`main(job, Schema, __doc__)`. Sub-dicts that name code (`_component_:
dotted.path` plus keyword arguments) are free-form in the schema and are checked by `instantiate`.
"""

import dataclasses
import difflib
import errno
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")


def load(schema: type[T], path: Path | None, overrides: list[str]) -> T:
    """Read `path` into an instance of `schema`; of `overrides` ("a.b=value") the last one wins.
    Without a `path` they are all there is.

    Values of overrides are YAML: `steps=10`, `name=null`, `tasks=[a,b]`; `tracks.0.weight=2`
    reaches into a list. Raises ValueError (unknown key, wrong type, missing required key, bad
    YAML), in one sentence that names the file or the override, and FileNotFoundError.
    """
    config = OmegaConf.structured(schema)
    source = file = str(path or "the command line")
    try:
        given = OmegaConf.load(path) if path else OmegaConf.create()
        if not OmegaConf.is_dict(given):
            raise ValueError(f"{path}: a configuration is a mapping of keys to values")
        values = typing.cast(dict[str, Any], OmegaConf.to_container(given))
        for key, value in values.items():
            OmegaConf.update(config, str(key), value, merge=True)
        for override in overrides:
            source = f"override {override!r}"
            key, equals, text = override.partition("=")
            if not equals or not key:
                raise ValueError(f"{source}: write it as key=value, e.g. seed=1")
            value = OmegaConf.from_dotlist([f"value={text}"]).value
            if typing.get_type_hints(schema).get(key) is str:  # as typed: "note: x" is a text
                value = text
            OmegaConf.update(config, key, value, merge=True)
        source = f"{file} with its overrides"
        missing = sorted(OmegaConf.missing_keys(config))
        OmegaConf.resolve(config)
    except (OmegaConfBaseException, TypeError, IndexError, yaml.YAMLError) as error:
        raise ValueError(_sentence(schema, source, error)) from error
    if missing:
        raise ValueError(
            f"{file}: no value for required {', '.join(missing)}; add to a YAML file or to the "
            f"command line, e.g. {missing[0]}=..."
        )
    return typing.cast(T, OmegaConf.to_object(config))


def key(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A key of a schema, with what `--help` says of it; required where it has no default."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def instantiate(spec: dict[str, Any], **extra: Any) -> Any:
    """Call what `spec["_component_"]` names with the rest of `spec` and with `extra` as keywords.

    `extra` is what the job itself passes, so `spec` may not also set it. The path may lead through
    a class: `speechfuse.quantizer.model.Quantizer.load`. Raises ValueError for a path that cannot
    be imported, for keywords the component does not take or lacks and, of components here, for
    values that are not of the declared type; its own errors pass through.
    """
    arguments = dict(spec)
    dotted = arguments.pop("_component_", None)
    if not isinstance(dotted, str):
        raise ValueError(f"_component_ is missing from {spec}: give the dotted path to call")
    component = resolve(dotted)
    if both := sorted(arguments.keys() & extra.keys()):
        raise ValueError(f"{dotted}: the job itself sets {', '.join(both)}; remove from the config")
    arguments.update(extra)
    try:
        parameters = inspect.signature(component).parameters.values()
    except ValueError:  # some builtins have no signature; then the call itself is the check
        return component(**arguments)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in arguments:
            if name not in names:
                raise ValueError(f"{dotted}: unknown argument '{name}'{_nearest(name, names)}")
    required = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if required:
        raise ValueError(
            f"{dotted}: no value for required {', '.join(required)}; add it beside _component_"
        )
    if dotted.startswith(f"{__package__}."):  # others declare types that they do not mean
        hints = typing.get_type_hints(
            component.__init__ if inspect.isclass(component) else component
        )
        for name in spec.keys() & hints.keys():
            if not _fits(spec[name], hints[name]):
                wanted = inspect.formatannotation(hints[name])
                raise ValueError(f"{dotted}: {name}={spec[name]!r} is not of the type {wanted}")
    return component(**arguments)


def modules_of(spec: Any) -> set[str]:
    """Names of the modules that define the components which `spec` names, at any depth."""
    if isinstance(spec, dict):
        dotted = spec.get("_component_")
        own = {resolve(dotted).__module__} if isinstance(dotted, str) else set()
        return own.union(*map(modules_of, spec.values()))
    return set().union(*map(modules_of, spec)) if isinstance(spec, list | tuple) else set()


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value as YAML has it can be of a declared type; of a class yes, whatever it is."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple and Ellipsis not in inner:
        several = isinstance(value, list | tuple) and len(value) == len(inner)
        return several and all(map(_fits, value, inner))
    if origin in (list, tuple, Sequence, Iterable):
        return isinstance(value, list | tuple) and all(_fits(each, inner[0]) for each in value)
    if (origin or hint) is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    return True


def main(job: Callable[[T], None], schema: type[T], doc: str) -> None:
    """The command line of a job: `config.yaml key=value ...`, `key=value ...` where no file is
    needed, or `--help` for `doc` and the keys. `--dry-run` is short for runtime.dry_run=true.

    A ValueError, or an OSError about a file, is the user's to cure: one line on stderr, exit status
    2. Ctrl-C exits with 130. Any other exception is ours and keeps its traceback.
    """
    arguments = ["runtime.dry_run=true" if a == "--dry-run" else a for a in sys.argv[1:]]
    if "--help" in arguments or "-h" in arguments:
        print(f"{doc.strip()}\n\n{_table(schema)}")
        return
    try:
        if not arguments or (arguments[0].startswith("-") and arguments[0] != "--config"):
            raise ValueError(
                "the first argument is a YAML file, or a key=value where no file is needed: "
                "config.yaml key=value ...; --help lists the keys"
            )
        if arguments[0] == "--config":  # as torchtune's `tune run` passes it on
            del arguments[0]
        if "=" in arguments[0]:
            job(load(schema, None, arguments))
        else:
            job(load(schema, Path(arguments[0]), arguments[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or "a disk that the job writes to"
            _fail(f"{where}: no space is left: make room and run again; what is finished is kept")
        if error.filename is None and not isinstance(error, FileNotFoundError):
            raise
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _sentence(schema: type, source: str, error: Exception) -> str:
    """What OmegaConf or YAML complained of, as one sentence that starts with `source`."""
    first = str(error).splitlines()[0]
    if isinstance(error, yaml.YAMLError):
        return f"{source}: not valid YAML: {' '.join(str(error).split())}"
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        owner = getattr(error, "object_type", None)
        if dataclasses.is_dataclass(owner):
            names = [field.name for field in dataclasses.fields(owner)]
            return f"{source}: unknown key '{key}'{_nearest(key, names)}"
    declared = {name: kind for name, kind, _, _ in _rows(schema)}.get(key)
    must = f" ('{key}' is declared as {declared})" if declared else f" (at '{key}')" if key else ""
    return f"{source}: {first}{must}"


def _nearest(key: str, names: Iterable[str]) -> str:
    """ "; did you mean 'x'? Allowed: ..." for the last part of a dotted `key`."""
    prefix, dot, last = key.rpartition(".")
    names = list(names)
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
    guess = f"; did you mean '{prefix}{dot}{close[0]}'?" if close else "."
    return f"{guess} Allowed here: {', '.join(names) or 'none'}"


def resolve(dotted: str) -> Any:
    """The class or function at a dotted path; ValueError when there is none."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # only "this very path is no module" means: try a shorter one
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ValueError(
                    f"{dotted}: {name} needs the module {error.name}, which is not installed here"
                ) from error
            continue
        names = getattr(found, "COMPONENTS", {})  # a room's face, not imported before it is used
        if parts[cut] in names:
            return resolve(".".join([name, names[parts[cut]], *parts[cut + 1 :]]))
        for part in parts[cut:]:
            if not hasattr(found, part):
                names = [*names, *(known for known in dir(found) if not known.startswith("_"))]
                close = difflib.get_close_matches(part, names, n=1)
                guess = f"; did you mean '{close[0]}'?" if close else ""
                raise ValueError(f"_component_ {dotted}: {name} has no '{part}'{guess}")
            found = getattr(found, part)
        if not callable(found):
            raise ValueError(f"_component_ {dotted} is not a class or a function")
        return found
    raise ValueError(
        f"_component_ {dotted}: there is no module '{parts[0]}'; give the full dotted "
        "path, e.g. speechfuse.quantizer.model.Quantizer.load"
    )


def _rows(schema: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default, help) of every key of a dataclass, or of an instance of one."""
    rows = []
    hints = typing.get_type_hints(schema if isinstance(schema, type) else type(schema))
    for field in dataclasses.fields(schema):
        hint, default = hints[field.name], field.default
        if not isinstance(schema, type):
            default = getattr(schema, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            rows += _rows(hint if default is dataclasses.MISSING else default, f"{key}.")
            continue
        plain = isinstance(hint, type) and typing.get_origin(hint) is None
        kind = hint.__name__ if plain else str(hint).replace("typing.", "").replace("pathlib.", "")
        shown = "required" if default in (dataclasses.MISSING, "???") else f"{default}"
        rows.append((key, kind, shown, field.metadata.get("help", "")))
    return rows


def _table(schema: type) -> str:
    rows = [("key", "type", "default", "meaning"), *_rows(schema)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    return "\n".join(lines)

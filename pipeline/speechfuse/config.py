"""Configuration of every job: dataclass defaults < YAML file < key=value overrides.

In: a dataclass (the schema), a YAML file, and overrides such as `quantizer.window=5`. Out: an
instance of the dataclass, in which every key is known and every value is of its declared type. A
value may be taken from another YAML file: ${file:recipes/demo/voices.yaml,train}. A job is run as

    python -m stages.<job> [config.yaml] key=value ...

and its module ends with `main(job, Schema, __doc__)`. Sub-dicts that name code (`_component_:
dotted.path` plus keyword arguments) are free-form in the schema and are checked by `instantiate`.
"""

import dataclasses
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf, ReadonlyConfigError
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from speechfuse import failures, yaml_values
from speechfuse.components import bind as bind
from speechfuse.components import instantiate as instantiate
from speechfuse.components import modules_of as modules_of
from speechfuse.components import nearest, refuse_not_finite
from speechfuse.components import resolve as resolve

T = TypeVar("T")
YAML = (".yaml", ".yml")
INTERRUPTED = "interrupted: what is finished is kept; the same command goes on from there"
_ENTRIES = (dict[str, dict[str, Any]], list[dict[str, Any]])
_WRONG = (OmegaConfBaseException, TypeError, IndexError, UnicodeDecodeError, yaml.YAMLError)
_OVERRIDE = re.compile(r"([A-Za-z_]\w*)([.\[][^=]*)?=")


def load(schema: type[T], path: Path | None, overrides: list[str]) -> T:
    """Return an instance of `schema` with the values of the YAML file `path`, if any, and of
    `overrides` ("a.b=value"). An override wins over the file and over earlier overrides. `null`
    leaves out an entry {...} of a mapping or list of such entries; where that left shares, those of
    the other entries are scaled to sum to 1, which is printed.

    Values are YAML, see yaml_values: `steps=10`, `name=null`, `tasks=[a,b]`; `tracks.0.weight=2`
    reaches into a list. Raises ValueError for an unknown key, a wrong type, a value that `key` does
    not allow, a missing required key and bad YAML; its message is one sentence that names the file,
    the override or the key. Raises FileNotFoundError when there is no such file.
    """
    config = OmegaConf.structured(schema)
    source = file = str(path or "the command line")
    hints, left_out = typing.get_type_hints(schema), dict[str, set[str]]()
    try:
        settings = yaml_values.with_files(yaml_values.settings(path, schema)) if path else {}
        for key, value in settings.items():
            OmegaConf.update(config, str(key), value, merge=True)
        for override in overrides:
            source = f"override {override!r}"
            key, equals, text = override.partition("=")
            if not equals or not key:
                raise ValueError(f"{source}: write it as key=value, e.g. seed=1")
            if key in {"recipe", "ranks"} - hints.keys():
                raise ValueError(f"{source}: {key}= goes before the verb: just {override} VERB")
            hint = _declared(schema, key)
            value = yaml_values.parse(text, hint)
            if hint is str or (hint == str | None and value is not None):
                value = text  # verbatim: in YAML "a: b" is a dict
            above, _, last = key.rpartition(".")
            if value is None and hints.get(above) in _ENTRIES:
                names = _names(OmegaConf.select(config, above))
                if last not in names:
                    raise ValueError(f"{source}: {above} has no {last}{nearest(last, names)}")
                left_out.setdefault(above, set()).add(last)
                OmegaConf.set_readonly(OmegaConf.select(config, key), True)
            else:
                OmegaConf.update(config, key, value, merge=True)
        for above, gone in left_out.items():
            _leave_out(above, OmegaConf.select(config, above), gone)
        source = f"{file} with its overrides"
        missing = sorted(OmegaConf.missing_keys(config))
        OmegaConf.resolve(config)
    except _WRONG as error:
        raise ValueError(_sentence(schema, source, error)) from error
    if missing:
        raise ValueError(
            f"{file}: no value for required {', '.join(missing)}; add to a YAML file or to the "
            f"command line, e.g. {missing[0]}=..."
        )
    settings = typing.cast(T, OmegaConf.to_object(config))
    _check_values(settings)
    return settings


def _names(entries: Any) -> list[str]:
    """Return the keys of a mapping, or the indexes of a list, as a command line writes them."""
    return list(map(str, entries if OmegaConf.is_dict(entries) else range(len(entries or ()))))


def _leave_out(key: str, entries: Any, gone: set[str]) -> None:
    """Remove the entries `gone` of a mapping or list. In a mapping the shares of the others are
    scaled to sum to 1, which is printed; shares of a list may sum to anything."""
    if not OmegaConf.is_dict(entries):
        for index in sorted(map(int, gone), reverse=True):
            del entries[index]
        return
    for name in gone:
        del entries[name]
    shares = {name: spec.get("share") for name, spec in entries.items()}
    if not shares or not all(isinstance(share, int | float) for share in shares.values()):
        return
    if (total := sum(shares.values())) > 0 and abs(total - 1) > 1e-6:
        for name, share in shares.items():
            entries[name].share = share / total
        new = ", ".join(f"{name} {share / total:.4g}" for name, share in shares.items())
        print(f"{key}: without {', '.join(sorted(gone))} the shares are {new}")


def _declared(schema: Any, key: str) -> Any:
    """Return the type of a dotted key; None in the free-form parts of a schema."""
    for part in key.split("."):
        hints = typing.get_type_hints(schema) if dataclasses.is_dataclass(schema) else {}
        schema = hints.get(part)
    return schema


def key(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    least: int | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """Return the dataclass field of a schema's key. `help` is what `--help` says of the key.
    Without `default` the key is required. A number is to be at least `least`, more than `above` and
    at most `most`, a string one of `choices`; `load` refuses others."""
    bounds = {"least": least, "above": above, "most": most}
    metadata = {"help": help, **bounds, "choices": tuple(choices)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _check_values(settings: Any, prefix: str = "") -> None:
    """Raise ValueError for the first value that is not what its `key` allows."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        least, above, most, choices = map(field.metadata.get, ("least", "above", "most", "choices"))
        for number, each in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(each):
                _check_values(each, f"{name}.{number}.")
        if dataclasses.is_dataclass(value):
            _check_values(value, f"{name}.")
            continue
        refuse_not_finite(name, value)
        if value is None:
            continue
        if isinstance(value, str) and not value.strip() and value != field.default:
            raise ValueError(f"{name} is empty: give it a value, or leave it out")
        elif choices and value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
        elif least is not None and not value >= least:
            raise ValueError(f"{name}={value}: at least {least} is needed")
        elif above is not None and not value > above:
            raise ValueError(f"{name}={value}: it must be above {above}")
        elif most is not None and not value <= most:
            raise ValueError(f"{name}={value}: at most {most} is possible")
        elif isinstance(value, int) and value >= 2**63:
            raise ValueError(f"{name}={value}: such a number does not fit into 64 bits")


def main(
    job: Callable[[T], None], schema: type[T], doc: str, positional: tuple[str, ...] = ()
) -> None:
    """Run the command line of a job: `[config.yaml] key=value ...`, or `--help` to print `doc` and
    the keys.

    A YAML file may be the first argument, also as torchtune's `--config FILE`. Arguments that are
    not key=value are values of the keys `positional`, in order. `--dry-run` is short for
    runtime.dry_run=true; with `--check` the configuration is read and nothing is run. What is for
    the user to correct (see failures.sentence) is printed as one line on stderr, and the exit
    status is 2. Ctrl-C exits with 130, a second one at once. Any other exception is a bug in this
    code and keeps its traceback.
    """
    failures.prepare()
    arguments = ["runtime.dry_run=true" if a == "--dry-run" else a for a in sys.argv[1:]]
    if "--help" in arguments or "-h" in arguments:
        print(f"{doc.strip()}\n\n{_table(schema)}")
        return

    def run() -> None:
        rest = [argument for argument in arguments if argument != "--check"]
        if rest[:1] == ["--config"]:
            del rest[0]
        path = Path(rest.pop(0)) if rest and rest[0].endswith(YAML) else None
        settings = load(schema, path, _as_overrides(schema, rest, positional))
        if "--check" not in arguments:
            job(settings)

    guarded(run)


def guarded(run: Callable[[], T], interrupted: str = INTERRUPTED) -> T:
    """Return what `run` returns; an error for the user to correct ends the process, see `main`.
    `interrupted`: what to say after Ctrl-C; of several ranks the first says it."""
    try:
        return run()
    except SystemExit:
        raise
    except BaseException as error:  # torch's checkpoints raise one that is no Exception
        if isinstance(error, KeyboardInterrupt) or failures.interrupted():
            if interrupted and os.environ.get("RANK", "0") == "0":
                failures.close_bars()
                print(interrupted, file=sys.stderr)
            failures.end()
        if (message := failures.sentence(error)) is None:
            raise
        failures.close_bars()
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


def _as_overrides(schema: type, arguments: list[str], positional: tuple[str, ...]) -> list[str]:
    """Return the arguments of a command line as ["key=value", ...]. Raises ValueError for an
    argument that has no key. Where a positional key has no value yet, "x=3 and y" is one if it has
    white space and the schema has no key x. The last positional key takes all that are left if it
    is a list."""
    hints, last = typing.get_type_hints(schema), "".join(positional[-1:])
    many = last if hints.get(last) == list[str] else None
    keys, overrides, listed = iter(positional), list[str](), list[str]()
    known = {field.name for field in dataclasses.fields(schema)}
    rest = len(positional)
    for argument in arguments:
        match = _OVERRIDE.match(argument)
        if match and (match[1] in known or len(argument.split()) == 1 or not rest):
            overrides.append(argument)
        elif argument.startswith("--") or (key := next(keys, many)) is None:
            if Path(argument).is_dir():
                own = f": name it after one, as corpus.path={argument}" * ("corpus" in known)
                raise ValueError(
                    f"{argument!r} is a folder; a job is configured by a YAML file{own}"
                )
            takes = " ".join(["[config.yaml]", *map(str.upper, positional), "key=value ..."])
            raise ValueError(f"{argument!r} is no key=value; the job takes {takes}; see --help")
        elif key == many:
            listed.append(argument)
        else:
            overrides.append(f"{key}={argument}")
            rest -= 1
    return overrides + [f"{many}={json.dumps(listed, ensure_ascii=False)}"] * bool(listed)


def _sentence(schema: type, source: str, error: Exception) -> str:
    """Return an error of OmegaConf or YAML as one sentence that starts with `source`."""
    if isinstance(error, yaml.YAMLError):
        return f"{source}: not valid YAML: {' '.join(str(error).split())}"
    if isinstance(error, ReadonlyConfigError):
        return f"{source}: an override before it left this entry out: give one of the two"
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        owner = getattr(error, "object_type", None)
        if dataclasses.is_dataclass(owner):
            names = [field.name for field in dataclasses.fields(owner)]
            return f"{source}: unknown key '{key}'{nearest(key, names)}"
    declared = {name: kind for name, kind, _, _ in _rows(schema)}.get(key)
    must = f" ('{key}' is declared as {declared})" if declared else f" (at '{key}')" if key else ""
    return f"{source}: {str(error).splitlines()[0]}{must}"


def _rows(schema: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return (dotted key, type, default, help) of every key of a dataclass or of an instance."""
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
        kind = re.sub(r"(typing|pathlib)\.", "", inspect.formatannotation(hint))
        shown = "required" if default in (dataclasses.MISSING, "???") else f"{default}"
        rows.append((key, kind, shown, field.metadata.get("help", "")))
    return rows


def _table(schema: type) -> str:
    rows = [("key", "type", "default", "meaning"), *_rows(schema)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    return "\n".join(lines)

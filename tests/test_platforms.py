"""The pins of constraints.txt resolve by wheels on every Python and platform that is promised.

Asked for each target: does the index have a wheel of exactly this version that installs there, and
has everything that speechfuse needs there, down to the last, a pin that fits? Only the index's
lists of files are read, from where pip is told to read them; no package is downloaded. Markers are
evaluated for the target, not for the machine that asks, so that one machine answers for all nine;
what a package needs is read from the one installed here, whose list is the same in every wheel.
What needs no index is tested without one; the rest is skipped, and says so, where none answers.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import (
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
JSON = "application/vnd.pypi.simple.v1+json"

# Never published as a wheel in this version: pip builds one on the spot. All are plain Python, so
# that this takes no compiler and gives the same on every platform.
SDIST_ONLY = {
    "docopt": "the command line of num2words",
    "openai-whisper": "the encoder of the quantizer; upstream publishes sources only",
    "rouge-score": "ROUGE of lm-eval's summaries",
    "sqlitedict": "lm-eval's cache of replies",
    "word2number": "lm-eval's tasks with numbers in words",
}


@dataclass(frozen=True)
class Target:
    """A Python on a platform; glibc 2.28 and macOS 14 are what torch's wheels ask for."""

    python: str
    system: str  # as in sys.platform
    machine: str

    def __str__(self) -> str:
        return f"{self.python}-{'macos' if self.system == 'darwin' else 'linux'}-{self.machine}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": self.system,
            "platform_machine": self.machine,
            "platform_system": "Darwin" if self.system == "darwin" else "Linux",
            "platform_release": "",
            "platform_version": "",
            "extra": "",
        }

    @property
    def tags(self) -> frozenset[Tag]:
        """Of the wheels that install here."""
        if self.system == "darwin":
            platforms = list(mac_platforms((14, 0), self.machine))
        else:
            first = 5 if self.machine == "x86_64" else 17
            names = [f"manylinux_2_{minor}" for minor in range(first, 29)] + ["manylinux2014"]
            names += ["manylinux1", "manylinux2010"] if first == 5 else []
            platforms = [f"{name}_{self.machine}" for name in [*names, "linux"]]
        major, minor = map(int, self.python.split("."))
        interpreter = f"cp{major}{minor}"
        return frozenset(
            [
                *cpython_tags((major, minor), [interpreter], platforms),
                *compatible_tags((major, minor), interpreter, platforms),
            ]
        )


PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
TARGETS = [Target(python, *platform) for platform in PLATFORMS for python in PYTHONS]
on_every_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def pins_on(target: Target, text: str) -> dict[str, Version]:
    """What constraints.txt pins there."""
    found: dict[str, Version] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if not pin.marker or pin.marker.evaluate(target.environment):
                (exactly,) = pin.specifier
                assert exactly.operator == "==", f"{line} is no pin"
                found[canonicalize_name(pin.name)] = Version(exactly.version)
    return found


PINS = (ROOT / "constraints.txt").read_text()


@dataclass(frozen=True)
class File:
    """Of a package, as the index lists it."""

    name: str
    version: Version
    pythons: str

    @property
    def tags(self) -> frozenset[Tag]:
        """Of a source: none. Slow, so asked only of the pinned version."""
        wheel = self.name.endswith(".whl")
        return parse_wheel_filename(self.name)[3] if wheel else frozenset()


def files_in(listing: list[dict[str, Any]]) -> Iterator[File]:
    """What pip would consider."""
    for file in listing:
        if file.get("yanked"):
            continue
        name, pythons = file["filename"], file.get("requires-python") or ""
        try:
            if name.endswith(".whl"):
                yield File(name, Version(name.split("-")[1]), pythons)
            elif name.endswith((".tar.gz", ".zip")):
                yield File(name, parse_sdist_filename(name)[1], pythons)
        except ValueError:  # names of old, from before there was a rule
            continue


def without_wheel(
    target: Target, pins: dict[str, Version], listed: dict[str, list[File]]
) -> list[str]:
    """A sentence for each pin that does not install on the target without a compiler."""
    faults, good = [], target.tags
    for name, pin in pins.items():
        of_pin = [file for file in listed[name] if file.version == pin]
        fits = [f for f in of_pin if SpecifierSet(f.pythons).contains(f"{target.python}.0")]
        what = f"{name} {pin} on {target}"
        if not of_pin:
            faults.append(f"{what}: the index has no such version.")
        elif not fits:
            faults.append(f"{what}: this version is for Python {of_pin[0].pythons}.")
        elif name in SDIST_ONLY:
            if any(file.tags for file in of_pin):
                faults.append(f"{what}: there is a wheel now; take it out of SDIST_ONLY.")
        elif not any(file.tags & good for file in fits):
            others = ", ".join(sorted(file.name for file in of_pin)[:3])
            faults.append(f"{what}: no wheel installs there; there are {others}, ...")
    return faults


def needs(name: str) -> list[str]:
    """What a package needs by its own metadata; speechfuse's are read from pyproject.toml."""
    if name == PROJECT["name"]:
        extras = PROJECT["optional-dependencies"].items()
        return PROJECT["dependencies"] + [
            str(one) + (" ;" if ";" not in one else " and") + f' extra == "{extra}"'
            for extra, wanted in extras
            for one in wanted
        ]
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []  # of another platform than this one's


def loose_ends(target: Target, pins: dict[str, Version], of: Any = needs) -> list[str]:
    """A sentence for each need, from `just setup` down, that no pin meets on the target."""
    faults: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [(PROJECT["name"], ""), (PROJECT["name"], "dev")]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for need in map(Requirement, of(name)):
            if need.marker and not need.marker.evaluate(target.environment | {"extra": extra}):
                continue
            other = canonicalize_name(need.name)
            # torch brings CUDA: a build for GPUs asks for a set of its own, one for CPUs for none
            if other.startswith(("nvidia-", "cuda-")) and name.startswith(("torch", "cuda-")):
                continue
            if other != PROJECT["name"]:
                if other not in pins:
                    faults.add(f"{name} needs {other} on {target}: constraints.txt has no pin.")
                elif not need.specifier.contains(pins[other], prereleases=True):
                    pinned = f"{other}{need.specifier} on {target}: the pin is {pins[other]}."
                    faults.add(f"{name} needs {pinned}")
            todo += [(other, chosen) for chosen in ["", *need.extras]]
    return sorted(faults)


@cache
def index() -> str:
    """Where pip looks for packages, as its own help says after reading all its configuration."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "400"},
    ).stdout
    found = re.search(r"--index-url.*?\(default:? (\S+?)\)", said, re.DOTALL)
    assert found, "pip's help does not say where its index is"
    return found[1].rstrip("/")


def certificates() -> str | bool:
    """The bundle that pip is told to trust, else what requests trusts."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    found = re.search(r"^\S*\.cert='(.*)'$", said, re.MULTILINE)
    return found[1] if found else True


@pytest.fixture(scope="module")
def listed() -> dict[str, list[File]]:
    """The index's files of every pinned package; skips where no index answers."""
    names = sorted({name for target in TARGETS for name in pins_on(target, PINS)})
    with requests.Session() as session:
        session.verify = certificates()
        session.headers["Accept"] = JSON
        session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=8, max_retries=2))

        def files(name: str) -> list[File]:
            answer = session.get(f"{index()}/{name}/", timeout=20)
            if answer.status_code == 404:
                return []
            answer.raise_for_status()
            return list(files_in(answer.json()["files"]))

        try:
            files("pip")
        except (requests.RequestException, KeyError) as error:
            pytest.skip(f"wheels are not looked up: the index gives no list ({error!r:.120})")
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(names, pool.map(files, names), strict=True))


def said(faults: Iterable[str]) -> str:
    return "\n" + "\n".join(faults)


@on_every_target
def test_every_pin_has_a_wheel(target, listed):
    faults = without_wheel(target, pins_on(target, PINS), listed)
    assert not faults, said(faults)


@on_every_target
def test_every_need_has_a_pin_that_fits(target):
    faults = loose_ends(target, pins_on(target, PINS))
    assert not faults, said(faults)


def test_the_promised_pythons_are_the_allowed_ones():
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert tuple(f"3.{m}" for m in range(8, 20) if allowed.contains(f"3.{m}.5")) == PYTHONS
    first, last = (int(python.split(".")[1]) for python in (PYTHONS[0], PYTHONS[-1]))
    justfile = (ROOT / "justfile").read_text()
    assert f"(3, {first}) <= sys.version_info < (3, {last + 1})" in justfile
    assert "3.11, 3.12 or 3.13 is needed" in justfile


@pytest.mark.parametrize("name", SDIST_ONLY)
def test_what_is_built_on_the_spot_is_plain_python(name):
    wheel = importlib.metadata.distribution(name).read_text("WHEEL") or ""
    assert "Root-Is-Purelib: true" in wheel and "-none-any" in wheel, f"{name}: {wheel}"


MAC, ARM, OLD = Target("3.12", *PLATFORMS[2]), Target("3.13", *PLATFORMS[1]), TARGETS[0]


@pytest.mark.parametrize(
    "target, files, sentence",
    [
        (MAC, ["x-1.0-cp312-cp312-manylinux_2_28_x86_64.whl", "x-1.0.tar.gz"], "no wheel installs"),
        (MAC, ["x-1.0-cp312-cp312-macosx_11_0_arm64.whl"], None),
        (MAC, ["x-1.0-cp312-cp312-macosx_15_0_arm64.whl"], "no wheel installs"),
        (ARM, ["x-1.0-cp312-cp312-manylinux_2_28_aarch64.whl"], "no wheel installs"),
        (ARM, ["x-1.0-cp39-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64.whl"], None),
        (ARM, ["x-1.0-py3-none-any.whl"], None),
        (OLD, ["x-1.0-cp311-cp311-manylinux_2_34_x86_64.whl"], "no wheel installs"),
        (OLD, ["x-1.0-cp311-cp311-manylinux1_x86_64.whl"], None),
        (OLD, ["x-1.1-py3-none-any.whl"], "the index has no such version"),
        (OLD, ["x-1.0-py3-none-any.whl >=3.12"], "this version is for Python >=3.12"),
        (OLD, ["x-1.0-py3-none-any.whl yanked"], "the index has no such version"),
    ],
)
def test_a_pin_without_a_wheel_is_named(target, files, sentence):
    x = [
        {
            "filename": name,
            "yanked": more == "yanked",
            "requires-python": more if more.startswith(">") else None,
        }
        for name, _, more in (file.partition(" ") for file in files)
    ]
    faults = without_wheel(target, {"x": Version("1.0")}, {"x": list(files_in(x))})
    assert len(faults) == bool(sentence)
    if sentence:
        assert faults[0].startswith(f"x 1.0 on {target}: {sentence}")


def test_a_wheel_of_what_had_none_is_named():
    files = [{"filename": "docopt-0.6.2.tar.gz"}, {"filename": "docopt-0.6.2-py3-none-any.whl"}]
    pins = {"docopt": Version("0.6.2")}
    assert not without_wheel(OLD, pins, {"docopt": list(files_in(files[:1]))})
    (fault,) = without_wheel(OLD, pins, {"docopt": list(files_in(files))})
    assert "there is a wheel now" in fault


def test_a_need_without_a_pin_that_fits_is_named():
    """A marker decides by the target; a pin that is too old, or not there, is said."""
    table = {
        "speechfuse": [
            "one",
            'two>=2; sys_platform == "darwin"',
            'speechfuse[x]; extra == "dev"',
            'three[more]; extra == "x"',
        ],
        "three": ['four; extra == "more"', 'five; extra == "less"'],
    }
    pins = pins_on(OLD, 'one==1\ntwo==1\nthree==3\nfour==4; sys_platform == "darwin"\n')
    faults = loose_ends(OLD, pins, lambda name: table.get(name, []))
    assert faults == [f"three needs four on {OLD}: constraints.txt has no pin."]
    pins = pins_on(MAC, 'one==1\ntwo==1\nthree==3\nfour==4; sys_platform == "darwin"\n')
    faults = loose_ends(MAC, pins, lambda name: table.get(name, []))
    assert faults == [f"speechfuse needs two>=2 on {MAC}: the pin is 1."]

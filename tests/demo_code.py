"""The scripts of recipes/demo by path: recipes is no package here, and torchtune installs one."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "recipes/demo"


def demo(name: str) -> ModuleType:
    """The module of recipes/demo/`name`.py, loaded once."""
    known = f"demo_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
        assert spec and spec.loader
        sys.modules[known] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[known]

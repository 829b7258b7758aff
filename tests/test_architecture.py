"""Who may import whom, what nobody may call, and that its job would accept every recipe.

Read from the source with ast; every rule is also shown a tree that breaks it.
"""

import ast
import fnmatch
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from speechfuse import config
from speechfuse.evals.sweep import Evaluate
from speechfuse.train.loop import Finetune
from stages.ask import Ask
from stages.curate_texts import CurateTexts
from stages.expand_vocab import ExpandVocab
from stages.gate import Gate
from stages.report import Report
from stages.synthesize_instructions import SynthesizeInstructions
from stages.tokenize_speech import TokenizeSpeech
from stages.train_quantizer import TrainQuantizer
from tests.demo_code import demo

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "stages", "recipes", "tests")
DOORS = {  # third party: the files that may import it, tests apart
    "torchtune": ["pipeline/speechfuse/train/*", "pipeline/speechfuse/samples/datasets.py"],
    "whisper": [
        "pipeline/speechfuse/quantizer/model.py",
        "pipeline/speechfuse/quantizer/decoder.py",
    ],
    "whisper.normalizers": ["pipeline/speechfuse/scores/word_errors.py"],
    "lm_eval": ["pipeline/speechfuse/evals/*"],
    "openai": ["pipeline/speechfuse/scores/judge.py"],
    "requests": ["pipeline/speechfuse/openai_server.py"],
    "datasketch": ["pipeline/speechfuse/texts/curation/duplicates.py"],
    "py3langid": ["pipeline/speechfuse/texts/curation/language.py"],
    "num2words": ["pipeline/speechfuse/texts/curation/*"],
    "espeakng_loader": ["pipeline/speechfuse/audio/espeak_ng.py"],
    "ray": ["pipeline/speechfuse/ray_cluster.py"],
    "huggingface_hub": ["pipeline/speechfuse/hub/*"],
    "huggingface_hub.save_torch_state_dict": ["pipeline/speechfuse/train/model.py"],
}
JOBS: dict[str, type] = {  # recipe file: the schema of its job
    "tokenize.yaml": TokenizeSpeech,
    "tokenize_*.yaml": TokenizeSpeech,
    "curate_*.yaml": CurateTexts,
    "synthesize.yaml": SynthesizeInstructions,
    "synthesize_*.yaml": SynthesizeInstructions,
    "stage[12].yaml": Finetune,
    "stage[12]_*.yaml": Finetune,
    "train_base.yaml": Finetune,
    "train_quantizer.yaml": TrainQuantizer,
    "expand_vocab.yaml": ExpandVocab,
    "evaluate.yaml": Evaluate,
    "evaluate_*.yaml": Evaluate,
    "report.yaml": Report,
    "report_*.yaml": Report,
    "gate.yaml": Gate,
    "ask.yaml": Ask,
}
SCRIPTS = {  # of recipes/demo, not of stages/
    "world.yaml": "World",
    "dialogues.yaml": "Dialogues",
    "init_base.yaml": "InitBase",
    "say.yaml": "Say",
    "seed_variance.yaml": "SeedVariance",
}
OF_THE_JOB = {  # keys beside a component that the job itself reads
    "speechfuse.synthesis.": ["texts", "select"],
    "speechfuse.audio.": ["probability"],
}
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*/*.yaml"))


def sources(root: Path, rooms: tuple[str, ...] = ROOMS) -> dict[str, ast.Module]:
    """Python files by path relative to `root`."""
    paths = [path for room in rooms for path in sorted((root / room).rglob("*.py"))]
    return {p.relative_to(root).as_posix(): ast.parse(p.read_text("utf-8"), str(p)) for p in paths}


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that a file imports, at any depth: `from a import b` gives a.b."""
    package = Path(name).parent.as_posix().removeprefix("pipeline/").split("/")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def below(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def wrong_imports(root: Path) -> list[str]:
    """The rules of the rooms that `root` breaks, as "file: import"."""
    found = []
    for name, tree in sources(root).items():
        for imported in imports(name, tree):
            own = "stages." + Path(name).stem
            rules = [
                below(imported, "recipes"),
                name.startswith("pipeline/") and below(imported, "stages"),
                name.startswith("stages/")
                and below(imported, "stages")
                and not below(imported, own),
                name.startswith("recipes/") and below(imported, "stages"),
                not name.startswith("tests/") and below(imported, "tests"),
            ]
            if not name.startswith("tests/"):
                opened = [d for d in DOORS if below(imported, d.split(".")[0])]
                allowed = [d for d in opened if any(fnmatch.fnmatch(name, f) for f in DOORS[d])]
                rules.append(bool(opened) and not any(below(imported, d) for d in allowed))
            if any(rules):
                found.append(f"{name}: {imported}")
    return found


def unsafe_calls(root: Path) -> list[str]:
    """Calls that would run code out of a downloaded file, as "file:line"."""
    found = []
    for name, tree in sources(root).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keys = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
                unsafe = (
                    keys.get("weights_only", "True") != "True"
                    or keys.get("trust_remote_code", "False") != "False"
                    or keys.get("allow_pickle", "False") != "False"
                    or (called == "torch.load" and keys.get("weights_only") != "True")
                    or called in ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load")
                    or called.startswith(("joblib.", "dill.", "cloudpickle."))
                )
            elif isinstance(node, ast.ImportFrom):
                unsafe = node.module in ("pickle", "dill", "joblib") and any(
                    alias.name in ("load", "loads", "Unpickler", "*") for alias in node.names
                )
            elif isinstance(node, ast.Dict):  # {"trust_remote_code": True} on its way into a call
                keys = {
                    k.value: ast.unparse(v)
                    for k, v in zip(node.keys, node.values, strict=True)
                    if isinstance(k, ast.Constant)
                }
                unsafe = (
                    keys.get("trust_remote_code", "False") != "False"
                    or keys.get("weights_only") == "False"
                )
            else:
                continue
            if unsafe:
                found.append(f"{name}:{node.lineno}")
    return found


def test_every_import_obeys_the_rooms():
    assert wrong_imports(ROOT) == []


def test_every_room_and_door_is_in_use():
    """So that the rules above are rules about something."""
    read = {name: set(imports(name, tree)) for name, tree in sources(ROOT).items()}
    assert sum(name.startswith("pipeline/speechfuse/") for name in read) >= 15
    assert sum(name.startswith("stages/") for name in read) >= 6
    for name, found in read.items():
        if name.startswith("stages/") and not name.endswith("__init__.py"):
            assert any(below(i, "speechfuse") for i in found), f"{name} does not use the library"
    for door, files in DOORS.items():
        users = [n for n, found in read.items() if any(below(i, door) for i in found)]
        assert any(fnmatch.fnmatch(user, file) for user in users for file in files), door


def test_jobs_start_without_what_few_of_them_use():
    """Each of these takes seconds to import."""
    jobs = "import stages.gate, stages.report, stages.evaluate, speechfuse.evals.speech"
    heavy = "{'openai', 'nltk', 'sacrebleu', 'whisper', 'lm_eval'}"
    code = f"{jobs}, sys; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("pipeline/speechfuse/a.py", "import stages.ask"),
        ("pipeline/speechfuse/a.py", "from stages import ask"),
        ("pipeline/speechfuse/a.py", "import recipes"),
        ("pipeline/speechfuse/a.py", "def f():\n    from torchtune import training"),
        ("pipeline/speechfuse/a.py", "import importlib\nimportlib.import_module('stages.ask')"),
        ("pipeline/speechfuse/evals/a.py", "import whisper"),
        ("pipeline/speechfuse/scores/word_errors.py", "import whisper.model"),
        ("pipeline/speechfuse/scores/word_errors.py", "import whisper"),
        ("pipeline/speechfuse/quantizer/model.py", "import espeakng_loader"),
        ("pipeline/speechfuse/train/a.py", "from lm_eval import evaluator"),
        ("stages/a.py", "from stages.ask import Ask"),
        ("stages/a.py", "from . import ask"),
        ("stages/a.py", "from .ask import Ask"),
        ("stages/a.py", "import lm_eval"),
        ("stages/train.py", "from stages import ask"),
        ("recipes/demo/world.py", "from recipes.demo import world"),
        ("tests/test_a.py", "from recipes import finetune"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("import json\nfrom speechfuse import config\n")
    assert wrong_imports(tmp_path) == []
    path.write_text(line)
    assert len(wrong_imports(tmp_path)) == 1


def test_recipes_is_no_package():
    assert list((ROOT / "recipes").rglob("*.py"))
    assert list((ROOT / "recipes").rglob("__init__.py")) == []


def test_nothing_loads_code_from_data():
    assert unsafe_calls(ROOT) == []
    loads = [
        node
        for tree in sources(ROOT).values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert loads, "nothing here reads a torch file: the rule says nothing"
    for path in RECIPES:
        assert "trust_remote_code" not in (ROOT / path).read_text()


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "pickle.load(file)",
        "pickle.loads(data)",
        "from pickle import load",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "load_dataset(name, trust_remote_code=trust)",
        "yaml.load(text)",
    ],
)
def test_an_unsafe_call_is_found(tmp_path, line):
    path = tmp_path / "stages" / "a.py"
    path.parent.mkdir()
    path.write_text("torch.load(path, weights_only=True)\nimport pickle\nnp.load(path)\n")
    assert unsafe_calls(tmp_path) == []
    path.write_text(line)
    assert len(unsafe_calls(tmp_path)) == 1


def schema_of(name: str) -> type:
    """The schema that reads a recipe file; KeyError for a file that no job is known to read."""
    if name in SCRIPTS:
        return getattr(demo(name.removesuffix(".yaml")), SCRIPTS[name])
    for pattern, schema in JOBS.items():
        if fnmatch.fnmatch(name, pattern):
            return schema
    raise KeyError(f"{name}: no job is known to read it; name its schema in this test")


def components(value: Any) -> Iterator[dict[str, Any]]:
    """Every {_component_: ...} inside a configuration, the inner ones too."""
    if isinstance(value, dict):
        if "_component_" in value:
            yield value
        for inner in value.values():
            yield from components(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from components(inner)


def check_component(spec: dict[str, Any]) -> None:
    """It resolves, and takes the keys beside it, but for those of the job that names it."""
    found = config.resolve(spec["_component_"])
    others = ["_component_", "share"]
    for package, keys in OF_THE_JOB.items():
        others += keys if spec["_component_"].startswith(package) else []
    arguments = {key: value for key, value in spec.items() if key not in others}
    inspect.signature(found).bind_partial(**arguments)


@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_fits_its_job_and_names_what_exists(path):
    name = Path(path).name
    config.load(schema_of(name), ROOT / path, [])
    found = list(components(yaml.safe_load((ROOT / path).read_text())))
    for spec in found:
        check_component(spec)
    if name.startswith(("tokenize_", "stage", "train_", "evaluate")):
        assert found


def test_recipes_are_found_and_unknown_ones_fail():
    assert len(RECIPES) >= 10 and {"recipes/demo/stage2.yaml", "recipes/demo/world.yaml"} <= set(
        RECIPES
    )
    with pytest.raises(KeyError, match=r"stage3\.yaml"):
        schema_of("stage3.yaml")
    with pytest.raises(ValueError, match="no 'sounds'"):
        check_component({"_component_": "speechfuse.samples.sounds"})
    with pytest.raises(TypeError, match="selekt"):
        check_component({"_component_": "speechfuse.samples.sound", "selekt": {}})

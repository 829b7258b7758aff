"""Who may import whom, what nobody may call, and that each recipe fits its job.

Read from the source with ast; every rule is also shown a tree that breaks it.
"""

import ast
import fnmatch
import importlib
import inspect
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from speechfuse import config, yaml_values
from speechfuse.evals.sweep import Evaluate
from speechfuse.serve.config import Serve
from speechfuse.train.config import Finetune
from stages.ask import Ask
from stages.build_duplex import BuildDuplex
from stages.compare import Compare
from stages.curate_texts import CurateTexts
from stages.duplex import Duplex
from stages.encode_speech import EncodeSpeech
from stages.expand_vocab import ExpandVocab
from stages.export import Export
from stages.fit_codec import FitCodec
from stages.gate import Gate
from stages.push_to_hub import PushToHub
from stages.recognize_speech import RecognizeSpeech
from stages.report import Report
from stages.resynthesize import Resynthesize
from stages.synthesize_instructions import SynthesizeInstructions
from stages.tokenize_speech import TokenizeSpeech
from stages.train_quantizer import TrainQuantizer
from tests.demo_code import demo

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "stages", "recipes", "tests")
LIBRARY = "pipeline/speechfuse/"
FLOORS = (  # from the ground up; a room imports rooms of lower floors alone
    ("failures", "json_lines", "locks", "patterns", "provenance", "scores", "yaml_values"),
    ("components", "rwkv", "workers"),
    ("config",),
    ("artifact", "ray_cluster"),
    ("audio", "openai_server", "report", "rows", "tokens"),
    ("codecs", "hub", "samples"),
    ("corpora", "fusion", "texts"),
    ("evals", "quantizer", "train"),
    ("serve", "synthesis"),
    ("stages", "recipes"),
)
NAMED = re.compile(r"speechfuse\.[\w.]*\w")  # in YAML
GROUND = ("speechfuse.workers.", "speechfuse.ray_cluster.")  # the flat files that YAML may name
LONGEST = 350  # lines of a file
DOORS = {  # third party: the files that may import it, tests apart
    "torchtune": ["pipeline/speechfuse/train/*", "pipeline/speechfuse/samples/datasets.py"],
    "whisper": [
        "pipeline/speechfuse/quantizer/encoder.py",
        "pipeline/speechfuse/quantizer/decoder.py",
        "pipeline/speechfuse/quantizer/frames.py",
        "pipeline/speechfuse/quantizer/ctranslate2.py",
    ],
    "whisper.normalizers": ["pipeline/speechfuse/scores/word_errors.py"],
    "pocketsphinx": ["pipeline/speechfuse/evals/recognizer.py"],
    "lm_eval": ["pipeline/speechfuse/evals/*"],
    "openai": ["pipeline/speechfuse/scores/judge.py", "pipeline/speechfuse/openai_server.py"],
    "aiohttp": ["pipeline/speechfuse/serve/app.py"],
    "datasketch": ["pipeline/speechfuse/texts/curation/duplicates.py"],
    "py3langid": ["pipeline/speechfuse/texts/curation/language.py"],
    "num2words": [
        "pipeline/speechfuse/texts/curation/*",
        "pipeline/speechfuse/samples/instructions.py",
        "recipes/demo/world.py",
    ],
    "espeakng_loader": ["pipeline/speechfuse/audio/espeak_ng.py"],
    "ray": ["pipeline/speechfuse/ray_cluster.py"],
    "huggingface_hub": ["pipeline/speechfuse/hub/*"],
    "markdown_it": ["pipeline/speechfuse/report/page.py"],
    "huggingface_hub.save_torch_state_dict": ["pipeline/speechfuse/train/checkpoint.py"],
}
JOBS: dict[str, type] = {  # recipe file: the schema of its job
    "tokenize.yaml": TokenizeSpeech,
    "tokenize_*.yaml": TokenizeSpeech,
    "encode_*.yaml": EncodeSpeech,
    "recognize_*.yaml": RecognizeSpeech,
    "splice_*.yaml": Finetune,
    "token_lora.yaml": Finetune,
    "compare.yaml": Compare,
    "curate_*.yaml": CurateTexts,
    "synthesize.yaml": SynthesizeInstructions,
    "synthesize_*.yaml": SynthesizeInstructions,
    "stage[12].yaml": Finetune,
    "stage[12]_*.yaml": Finetune,
    "train_base.yaml": Finetune,
    "train_rwkv.yaml": Finetune,
    "rwkv_*.yaml": Finetune,
    "init_rwkv.yaml": demo("init_base").InitBase,
    "train_quantizer*.yaml": TrainQuantizer,
    "expand_vocab.yaml": ExpandVocab,
    "evaluate.yaml": Evaluate,
    "evaluate_*.yaml": Evaluate,
    "report.yaml": Report,
    "report_*.yaml": Report,
    "gate.yaml": Gate,
    "ask.yaml": Ask,
    "serve.yaml": Serve,
    "export.yaml": Export,
    "fit_codec.yaml": FitCodec,
    "resynthesize.yaml": Resynthesize,
    "train_encoder.yaml": TrainQuantizer,
    "train_codec.yaml": TrainQuantizer,
    "duplex_t*.yaml": BuildDuplex,
    "duplex.yaml": Duplex,
    "duplex_lora.yaml": Finetune,
    "multitask_*.yaml": Finetune,
}
SCRIPTS = {  # of recipes/demo, not of stages/
    "world.yaml": "World",
    "dialogues.yaml": "Dialogues",
    "init_base.yaml": "InitBase",
    "multitask.yaml": "Multitask",
    "neural.yaml": "Neural",
    "say.yaml": "Say",
    "seed_variance.yaml": "SeedVariance",
}
OF_THE_JOB = {  # keys beside a component that the job itself reads
    "speechfuse.synthesis.": ["texts", "select"],
    "speechfuse.audio.": ["probability"],
}
SHARED = "recipes/demo/voices.yaml"  # read by others, as ${file:PATH,KEY}
RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "recipes").glob("*/*.yaml")
    if path != ROOT / SHARED
)


parse = cache(ast.parse)


def sources(root: Path, rooms: tuple[str, ...] = ROOMS) -> dict[str, ast.Module]:
    """Python files by path relative to `root`."""
    paths = [path for room in rooms for path in sorted((root / room).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): parse(path.read_text("utf-8")) for path in paths}


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


def module_of(file: str) -> str:
    """The dotted name of a file: speechfuse.rows.shards, or of an __init__.py its package's."""
    dotted = file.removeprefix("pipeline/").removesuffix(".py").replace("/", ".")
    return dotted.removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """speechfuse.rows.shards: rows; stages.ask: stages; of other packages None."""
    package, *rest = module.split(".")
    if package in ("stages", "recipes"):
        return package
    return rest[0] if package == "speechfuse" and rest else None


def arrows(root: Path) -> set[tuple[str, str]]:
    """(room, room that it imports), of the library, stages and recipes."""
    files = sources(root, ("pipeline", "stages", "recipes"))
    every = {
        (room_of(module_of(file)), room_of(name))
        for file, tree in files.items()
        for name in imports(file, tree)
    }
    return {(room, other) for room, other in every if room and other and room != other}


def wrong_arrows(root: Path) -> list[str]:
    """Arrows that do not run down, and rooms that stand on no floor."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    files = sources(root, ("pipeline", "stages", "recipes"))
    rooms = {room for file in files if (room := room_of(module_of(file)))}
    return [f"{room} stands on no floor" for room in sorted(rooms - floor.keys())] + [
        f"{room} (floor {floor[room]}) -> {other} (floor {floor[other]})"
        for room, other in sorted(arrows(root))
        if room in floor and other in floor and floor[room] <= floor[other]
    ]


def circles(root: Path) -> list[str]:
    """The first circle of files of the library that import each other, [] where there is none."""
    files = {module_of(file): (file, tree) for file, tree in sources(root, ("pipeline",)).items()}
    graph = {
        module: {
            other
            for name in imports(*source)
            for other in (name, name.rpartition(".")[0])
            if other in files and other != module
        }
        for module, source in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def not_of_a_room(text: str) -> list[str]:
    """What a recipe names in the library that is no component of a room's face."""
    wrong = []
    for name in NAMED.findall(text):
        _, room, *rest = name.split(".")
        face = getattr(importlib.import_module(f"speechfuse.{room}"), "COMPONENTS", {})
        if not name.startswith(GROUND) and (not rest or rest[0] not in face):
            wrong.append(name)
    return wrong


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


def test_every_arrow_between_rooms_runs_down():
    assert wrong_arrows(ROOT) == [], f"{len(arrows(ROOT))} arrows between rooms"
    assert circles(ROOT) == []
    assert {*chain(*arrows(ROOT))} == {*chain(*FLOORS)}  # no floor speaks of a room that is gone


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        (
            "rows/a.py",
            "from speechfuse.samples import index",
            ["rows (floor 4) -> samples (floor 5)"],
        ),
        (
            "config.py",
            "def f():\n    import speechfuse.texts.b",
            ["config (floor 2) -> texts (floor 6)"],
        ),
        ("evals/a.py", "from speechfuse.train import loop", ["evals (floor 7) -> train (floor 7)"]),
        ("evals/a.py", "from stages import ask", ["evals (floor 7) -> stages (floor 9)"]),
        ("cellar/a.py", "import json", ["cellar stands on no floor"]),
    ],
)
def test_an_arrow_that_runs_up_is_found(tmp_path, file, line, wrong):
    for room in ("samples", "texts", "train", "rows", "artifact"):
        (tmp_path / LIBRARY / room).mkdir(parents=True)
        (tmp_path / LIBRARY / room / "b.py").write_text("")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "ask.py").write_text("from speechfuse.rows import b")
    (tmp_path / LIBRARY / "rows/b.py").write_text("from speechfuse import artifact")
    assert wrong_arrows(tmp_path) == []
    assert arrows(tmp_path) == {("stages", "rows"), ("rows", "artifact")}
    path = tmp_path / LIBRARY / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert wrong_arrows(tmp_path) == wrong


def test_a_circle_of_files_is_found(tmp_path):
    rows = tmp_path / LIBRARY / "rows"
    rows.mkdir(parents=True)
    (rows / "a.py").write_text("from speechfuse.rows import b")
    (rows / "b.py").write_text("from speechfuse import rows")
    assert circles(tmp_path) == []
    (rows / "b.py").write_text("def f():\n    from speechfuse.rows.a import c")
    assert set(circles(tmp_path)) == {"speechfuse.rows.a", "speechfuse.rows.b"}


def every_component() -> list[str]:
    """The dotted path of every component that a room lists."""
    rooms = [path.parent.name for path in sorted((ROOT / LIBRARY).glob("*/__init__.py"))]
    faces = {room: importlib.import_module(f"speechfuse.{room}") for room in rooms}
    names = [f"speechfuse.{r}.{n}" for r in rooms for n in getattr(faces[r], "COMPONENTS", {})]
    assert len(names) > 50
    return names


def test_every_component_of_a_room_resolves():
    """So that a file may move, and YAML that names the room stays as it is."""
    for name in every_component():
        assert callable(config.resolve(name)), name


def test_an_empty_text_is_refused_by_its_key(tmp_path):
    """As a path it would be the current folder."""
    tried = set()
    for dotted in every_component():
        parameters = inspect.signature(config.resolve(dotted), eval_str=True).parameters
        others = {n: "x" for n, p in parameters.items() if p.default is p.empty}
        for name, parameter in parameters.items():
            kinds = {parameter.annotation, *typing.get_args(parameter.annotation)}
            if parameter.default != "" and str in kinds:
                for empty in ["", ["a", ""]] if list[str] in kinds else [""]:
                    spec = {"_component_": dotted, name: empty}  # first, as the others are wrong
                    with pytest.raises(ValueError, match=f"^{dotted}: {name} is empty"):
                        config.bind(spec | {n: x for n, x in others.items() if n != name})
                    tried.add(name)
    assert {"path", "tars", "manifest", "audio_dir", "lines", "folder", "data"} <= tried
    with pytest.raises(ValueError, match=r"^path is empty: give it a value"):
        config.load(PushToHub, None, ["path="])
    (tmp_path / "push.yaml").write_text("path: x\nrepo: ''\n")
    with pytest.raises(ValueError, match=r"^repo is empty: give it a value"):
        config.load(PushToHub, tmp_path / "push.yaml", [])


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_names_rooms_and_no_files(path):
    assert not_of_a_room((ROOT / path).read_text()) == []


def test_a_recipe_that_names_a_file_is_found():
    text = "{a: speechfuse.samples.sound, b: speechfuse.ray_cluster.ray_actors}"
    assert not_of_a_room(text) == []
    assert not_of_a_room("x: speechfuse.samples.datasets.sound") == [
        "speechfuse.samples.datasets.sound"
    ]
    assert not_of_a_room("[speechfuse.config.load]") == ["speechfuse.config.load"]
    assert sum("speechfuse." in (ROOT / path).read_text() for path in RECIPES) > 10


def too_long(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for room in ("pipeline", "stages", "recipes")
        for path in (root / room).rglob("*.py")
        if len(path.read_text("utf-8").splitlines()) > LONGEST
    }


def test_no_file_is_long(tmp_path):
    assert too_long(ROOT) == set()
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "a.py").write_text("\n" * LONGEST)
    assert too_long(tmp_path) == set()
    (tmp_path / "stages" / "a.py").write_text("\n" * (LONGEST + 1))
    assert too_long(tmp_path) == {"stages/a.py"}


def test_the_formatter_has_the_last_word():
    mark = "fmt: " + "skip"
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert [path for path in files if mark in path.read_text("utf-8")] == []


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


HEAVY = (
    "torch transformers torchtune lm_eval datasets scipy sklearn pandas numba whisper openai nltk "
    "sacrebleu ray"
)
NOTHING = "absent-folder/absent"
ANSWERED = """
import io, runpy, sys, time
from contextlib import redirect_stderr, redirect_stdout
for line in sys.stdin:
    job, *arguments = line.split("\\t")
    text = io.StringIO()
    sys.argv = [job, *(a.strip() for a in arguments)]
    try:
        with redirect_stderr(text), redirect_stdout(text):
            run = runpy.run_path if job.endswith(".py") else runpy.run_module
            run(job, run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException as error:
        code = repr(error)
    print(job, code, " ".join(text.getvalue().split())[:9000], sep="|")
    if heavy := sorted({*HEAVY.split()} & sys.modules.keys()):
        sys.exit(f"{job} {arguments} imported {heavy}")
"""


def answers(lines: list[list[str]]) -> list[list[str]]:
    """[job, exit status, what it printed] of each job, given its arguments, all in one process
    that fails once any of them has imported what takes seconds."""
    code = f"HEAVY = {HEAVY!r}\n{ANSWERED}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join("\t".join(line) for line in lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/pipeline:{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    return [line.split("|", 2) for line in done.stdout.splitlines()]


def test_help_and_a_misspelt_key_need_no_heavy_import():
    modules = sorted(p.stem for p in (ROOT / "stages").glob("*.py") if p.stem != "__init__")
    jobs = [f"stages.{name}" for name in modules] + ["recipes/demo/say.py"]
    assert len(jobs) >= 15
    for job, code, text in answers([[job, "--help"] for job in jobs]):
        assert (code == "0" and "default" in text) or "key" in text, (job, code, text)
    for job, code, text in answers([[job, "outt=x"] for job in jobs]):
        assert code == "2" and "unknown key 'outt'" in text, (job, code, text)


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("stages.train", ["recipes/demo/stage1.yaml", f"checkpoint={NOTHING}"]),
        ("stages.train", ["recipes/demo/stage1.yaml", f"datasets.0.path={NOTHING}"]),
        ("stages.tokenize_speech", ["recipes/demo/tokenize.yaml", f"corpus.path={NOTHING}"]),
        ("stages.expand_vocab", ["recipes/demo/expand_vocab.yaml", f"base={NOTHING}"]),
        ("stages.expand_vocab", ["recipes/demo/expand_vocab.yaml", f"quantizer={NOTHING}"]),
        ("stages.ask", ["recipes/demo/ask.yaml", f"{NOTHING}.wav"]),
        ("stages.export", ["recipes/demo/export.yaml", "gguf", f"converter={NOTHING}"]),
        ("stages.verify", [NOTHING]),
        ("stages.inspect_dataset", [NOTHING]),
        ("stages.listen", [NOTHING]),
        ("stages.push_to_hub", [NOTHING]),
        ("stages.score_wer", [f"{NOTHING}.jsonl"]),
        ("stages.evaluate", ["recipes/demo/evaluate.yaml", f"checkpoints.0.path={NOTHING}"]),
        ("stages.report", ["recipes/demo/report.yaml", f"evals={NOTHING}"]),
        ("stages.gate", ["recipes/demo/gate.yaml", f"evals={NOTHING}"]),
        ("stages.curate_texts", ["recipes/demo/curate_texts.yaml", f"texts.0.path={NOTHING}"]),
        ("stages.synthesize_instructions", ["recipes/demo/synthesize.yaml", f"texts={NOTHING}"]),
    ],
)
def test_a_missing_file_needs_no_heavy_import(job, arguments):
    ((_, code, text),) = answers([[job, *arguments]])
    assert code == "2" and text.startswith("error: ") and "absent" in text, (code, text)


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
    others = ["_component_", "share", "times"]
    for package, keys in OF_THE_JOB.items():
        others += keys if spec["_component_"].startswith(package) else []
    arguments = {key: value for key, value in spec.items() if key not in others}
    inspect.signature(found).bind_partial(**arguments)


@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_fits_its_job_and_names_what_exists(path):
    name = Path(path).name
    config.load(schema_of(name), ROOT / path, [])
    found = list(components(yaml_values.with_files(yaml.safe_load((ROOT / path).read_text()))))
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

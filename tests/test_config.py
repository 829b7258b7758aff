"""Configuration: what wins, what is refused and in which words, and the command line of a job."""

import inspect
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from math import inf as INF
from pathlib import Path
from typing import Any

import pytest

from speechfuse import config
from speechfuse.evals.sweep import Evaluate
from stages.push_to_hub import PushToHub
from stages.synthesize_instructions import SynthesizeInstructions


@dataclass
class Encoder:
    path: Path
    window: float = field(default=30.0, metadata={"help": "seconds the encoder sees"})
    voice: str | None = None


@dataclass
class Job:
    out: Path
    encoder: Encoder
    seed: int = field(default=7, metadata={"help": "of every random choice"})
    name: str | None = None
    corpus: dict[str, Any] = field(default_factory=dict)
    tracks: list[dict[str, Any]] = field(default_factory=list)
    words: list[str] | None = None
    verbatim: str = ""
    shuffle: bool = True


FULL = """
out: out/data
encoder: {path: models/tiny, window: 5}
corpus: {_component_: builtins.dict, split: train, filters: {seconds: [1, 2]}}
tracks: [{weight: 1.0}, {weight: 2.0}]
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        config.load(Job, path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_default_then_file_then_overrides_and_the_last_override_wins(write):
    loaded = config.load(Job, write(FULL), ["encoder.window=9", "encoder.window=3.5"])
    assert loaded.seed == 7  # default
    assert loaded.encoder == Encoder(Path("models/tiny"), 3.5)  # file, then override
    assert config.load(Job, write(FULL), []).encoder.window == 5.0
    assert config.load(Job, write(FULL + "seed: 8"), []).seed == 8
    merged = config.load(Job, write(FULL), ["encoder={window: 2}"]).encoder
    assert merged == Encoder(Path("models/tiny"), 2.0)  # a mapping adds to what is there


def test_values_are_plain_and_of_the_declared_type(write):
    loaded = config.load(Job, write(FULL), ["tracks.1.weight=5", "name=null", "corpus.split=dev"])
    assert type(loaded) is Job and isinstance(loaded.out, Path)
    assert loaded.name is None
    assert type(loaded.corpus) is dict and type(loaded.corpus["filters"]["seconds"]) is list
    assert loaded.corpus["split"] == "dev" and loaded.corpus["filters"] == {"seconds": [1, 2]}
    assert loaded.tracks == [{"weight": 1.0}, {"weight": 5}]


SPELLINGS = "no Yes on OFF 1.10 1e5 007 1_000 0x1F 12:30:45 2024-01-01 12e4567 true".split()


@pytest.mark.parametrize("text", SPELLINGS)
def test_text_is_what_was_written(write, text):
    """Where a job declares text, on the command line and in a file."""
    assert config.load(Job, write(FULL), [f"name={text}"]).name == text
    assert config.load(Job, write(f"{FULL}name: {text}\nwords: [{text}, b]"), []).words == [
        text,
        "b",
    ]
    assert config.load(Job, write(f"{FULL}verbatim: {text}"), []).verbatim == text
    assert config.load(Job, write(FULL), [f"encoder.voice={text}"]).encoder.voice == text


def test_words_and_numbers_in_free_form_parts(write):
    values = "{a: no, b: on, c: 007, d: 1.10, e: 1_000, f: 1e-4, g: true, h: null, i: 12:30}"
    corpus = config.load(Job, write(FULL), [f"corpus={values}"]).corpus
    assert [corpus[key] for key in "abcdefghi"] == [
        *("no", "on", "007", 1.1, 1000, 0.0001, True, None, "12:30")
    ]
    loaded = config.load(Job, write(FULL), ["seed=1_000", "encoder.window=1e1", "shuffle=no"])
    assert (loaded.seed, loaded.encoder.window, loaded.shuffle) == (1000, 10.0, False)
    assert "duplicate key" in refusal(write("out: a\nout: b"))


def test_unknown_key_names_where_it_stands_and_the_nearest_allowed_one(write):
    in_file = refusal(write(FULL.replace("window", "windw")))
    assert "run.yaml" in in_file and "'encoder.windw'" in in_file
    assert "did you mean 'encoder.window'?" in in_file and "path, window" in in_file
    override = refusal(write(FULL), "encoder.pth=x")
    assert "override 'encoder.pth=x'" in override and "did you mean 'encoder.path'?" in override
    assert "did you mean 'seed'?" in refusal(write(FULL), "sede=1")
    assert "did you mean" not in refusal(write(FULL), "zzzz=1")


def test_missing_required_keys_are_all_named(write):
    message = refusal(write("encoder: {window: 5}"))
    assert "out" in message and "encoder.path" in message
    assert config.load(Job, write("encoder: {window: 5}"), ["out=a", "encoder.path=b"]).seed == 7


@pytest.mark.parametrize(
    ("override", "key", "kind"),
    [
        ("seed=many", "seed", "int"),
        ("seed=1.5", "seed", "int"),
        ("encoder.window=wide", "encoder.window", "float"),
        ("corpus=[1]", "corpus", "dict[str, Any]"),
    ],
)
def test_wrong_type_names_the_key_and_the_declared_type(write, override, key, kind):
    message = refusal(write(FULL), override)
    assert repr(override) in message and f"'{key}' is declared as {kind}" in message


@pytest.mark.parametrize("text", ["out: [", "- a list", "out: {a: b: c}"])
def test_a_file_that_is_no_mapping_is_refused_by_name(write, text):
    assert "run.yaml" in refusal(write(text))


def test_an_override_without_a_value_is_refused(write):
    assert "key=value" in refusal(write(FULL), "seed")
    assert "key=value" in refusal(write(FULL), "=3")


def component(path: str, *, window: float = 1.0) -> tuple[str, float]:
    return path, window


class Holder:
    @classmethod
    def load(cls, path: str) -> str:
        return f"loaded {path}"

    refusing = 3


def test_instantiate_calls_the_component_and_leaves_the_spec_alone():
    spec = {"_component_": f"{__name__}.component", "path": "a"}
    assert config.instantiate(spec, window=2.0) == ("a", 2.0)
    assert config.instantiate(spec) == ("a", 1.0)
    assert spec == {"_component_": f"{__name__}.component", "path": "a"}
    through_class = {"_component_": f"{__name__}.Holder.load", "path": "b"}
    assert config.instantiate(through_class) == "loaded b"


def test_bind_checks_once_and_may_be_called_for_every_row(monkeypatch):
    call = config.bind({"_component_": f"{__name__}.component", "window": 2.0}, "path")
    monkeypatch.setattr(config, "resolve", None)  # nothing is looked up again
    assert [call(path=path) for path in "ab"] == [("a", 2.0), ("b", 2.0)]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no value for required path"):
        config.bind({"_component_": f"{__name__}.component"})
    with pytest.raises(ValueError, match="the job itself sets path"):
        config.bind({"_component_": f"{__name__}.component", "path": "a"}, "path")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"path": "a"}, ["_component_"]),
        ({"_component_": "no_such_package.x"}, ["no_such_package.x", "no module"]),
        ({"_component_": f"{__name__}.componet"}, ["componet", "did you mean 'component'?"]),
        ({"_component_": f"{__name__}.Holder.refusing"}, ["Holder.refusing", "not a class"]),
        ({"_component_": f"{__name__}.component", "path": "a", "widow": 1}, ["'window'?"]),
        ({"_component_": f"{__name__}.component"}, ["required path"]),
        ({"_component_": f"{__name__}.component", "path": "a", "rate": 1}, ["job", "rate"]),
    ],
)
def test_instantiate_refuses_in_words(spec, words):
    with pytest.raises(ValueError) as caught:
        config.instantiate(spec, **({"rate": 2} if "rate" in spec else {}))
    assert all(word in str(caught.value) for word in words), caught.value


def test_instantiate_tells_a_missing_dependency_from_a_wrong_path(tmp_path, monkeypatch):
    (tmp_path / "needy_component.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="no_such_dependency, which is not installed"):
        config.instantiate({"_component_": "needy_component.Thing"})


JOB = '''
"""Count things.

Runs as: python job.py config.yaml key=value
"""
from dataclasses import dataclass, field
from speechfuse.config import main

@dataclass
class Part:
    size: int = field(default=3, metadata={"help": "how many"})

@dataclass
class Config:
    out: str
    part: Part = field(default_factory=lambda: Part(5))

def job(config):
    if config.out == "value":
        raise ValueError("out is 'value';\\nchoose another")
    if config.out == "file":
        open("no/such/file")
    if config.out == "disk":
        open("/dev/full", "wb", buffering=0).write(b"1")
    if config.out == "ctrl-c":
        raise KeyboardInterrupt
    if config.out == "ours":
        raise RuntimeError("a mistake of ours")
    print("ran", config.out, config.part.size)

main(job, Config, __doc__, ("out",))
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "run.yaml").write_text("out: here\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "job.py", *arguments]
        source = Path(config.__file__).parents[1]
        return subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": str(source)}, capture_output=True, text=True
        )

    return run


def test_the_command_line_runs_the_job(run):
    done = run("run.yaml", "part.size=4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran here 4\n", "")


def test_a_job_runs_from_the_command_line_alone(run):
    done = run("out=here", "part.size=4", "out=there")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran there 4\n", "")


def test_what_has_no_key_is_the_value_of_a_positional_key(run):
    assert run("run.yaml", "a = b, {c: d}", "part.size=4").stdout == "ran a = b, {c: d} 4\n"
    assert run("run.yaml", "x=3, what is x", "part.size=4").stdout == "ran x=3, what is x 4\n"
    assert run("run.yaml", "out=x=3").stdout == "ran x=3 5\n"
    assert run("--config", "run.yaml", "part.size=4").stdout == "ran here 4\n"


def test_a_positional_key_that_is_a_list_takes_all_that_is_left():
    @dataclass
    class Job:
        name: str
        files: list[str]
        seed: int = 0

    arguments = ["x", "a.wav", "seed=3", "b, [c] é \U0001f600.wav", "yes"]
    overrides = config._as_overrides(Job, arguments, ("name", "files"))
    job = config.load(Job, None, overrides)
    assert job == Job("x", ["a.wav", "b, [c] é \U0001f600.wav", "yes"], 3)
    with pytest.raises(ValueError, match="no value for required files"):
        config.load(Job, None, config._as_overrides(Job, ["x"], ("name", "files")))


def test_help_shows_the_doc_and_every_key(run):
    done = run("--help")
    assert done.returncode == 0 and "Count things." in done.stdout and "ran" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["out", "str", "required"] in lines
    assert ["part.size", "int", "5", "how", "many"] in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.yaml", "part.sise=4"], "part.size"),
        (["run.yaml", "out=value"], "out is 'value'; choose another"),
        (["run.yaml", "out=file"], "no/such/file: No such file"),
        (["run.yaml", "out=disk"], "no space is left: make room and run again"),
        (["absent.yaml"], "absent.yaml: No such file"),
        ([], "no value for required out"),
        (
            ["run.yaml", "one", "two"],
            "'two' is no key=value; the job takes [config.yaml] OUT key=value",
        ),
        (["one", "."], "'.' is a folder; a job is configured by a YAML file"),
        (["run.yaml", "--ou=x"], "'--ou=x' is no key=value"),
        (["part.size=4"], "the command line: no value for required out"),
        (["ou=here"], "'ou=here': unknown key 'ou'; did you mean 'out'?"),
    ],
)
def test_what_the_user_can_cure_is_one_line_and_exit_code_2(run, arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_is_130_and_our_own_mistakes_keep_their_traceback(run):
    interrupted = run("run.yaml", "out=ctrl-c")
    assert interrupted.returncode == 130 and "Traceback" not in interrupted.stderr
    ours = run("run.yaml", "out=ours")
    assert ours.returncode == 1 and "Traceback" in ours.stderr


@pytest.mark.parametrize(
    ("component", "values", "said"),
    [
        ("synthesis.Transcription", {"requests": "say:"}, r"requests='say:' is not .* list\[str\]"),
        ("synthesis.MultiTurn", {"spoken": "half"}, "spoken='half' is not of the type float"),
        (
            "synthesis.Refusal",
            {"replies": ["no"], "level": -20},
            r"level=-20 is not .* tuple\[float",
        ),
        ("synthesis.Instruction", {"repeat_first": 1}, "repeat_first=1 is not of the type bool"),
        ("audio.Noise", {"snr": 20}, "snr=20 is not"),
        ("audio.Noise", {"snr": [0, "many"]}, "snr=.0, 'many'. is not"),
        ("synthesis.Espeak", {"variants": ["m1"], "rate": 170}, "rate=170 is not"),
        ("texts.Alpaca", {"path": None}, "path=None is not of the type str"),
        (
            "corpora.synthetic",
            {"lines": "a", "voices": {"b": 1}},
            "voices=.* is not of the type dict",
        ),
    ],
)
def test_values_are_of_the_declared_type(component, values, said):
    with pytest.raises(ValueError, match=said):
        config.instantiate({"_component_": f"speechfuse.{component}", **values})


SHAPE = "codes codebook_dim downsample n_audio_ctx n_audio_state n_audio_head n_audio_layer".split()
WHISPER = dict(zip(SHAPE, (64, 4, 2, 100, 8, 2, 1), strict=True))
WHISPER |= {"downsample_mean": True, "n_mels": 80}


@pytest.mark.parametrize(
    ("component", "values", "said"),
    [
        ("corpora.synthetic", {"snr": [40, 20]}, "snr=.40, 20.: give a range, .least, most."),
        ("corpora.synthetic", {"gain": [0, -10]}, "gain=.0, -10.: give a range"),
        ("audio.Noise", {"snr": [1]}, r"snr=\[1\] is not of the type tuple\[float, float\]"),
        ("audio.Gain", {"db": [0, 8000]}, "db=.*: it should be less than or equal to 200"),
        ("audio.Reverberation", {"decay": [0.1, INF]}, r"decay=\.inf: a finite number"),
        ("audio.Reverberation", {"decay": [-1, 0.5]}, "decay=.*: it should be greater than 0"),
        ("audio.Reverberation", {"decay": [0.1, 61]}, "decay=.*: it should be less than or equal"),
        ("audio.Silence", {"seconds": [1, 61]}, "seconds=.*: it should be less than or equal"),
        ("audio.Speed", {"factor": [0, 0]}, "factor=.*: it should be greater than 0"),
        ("audio.Lossy", {"compression": [0.5, 2]}, "compression=.*: it should be less than"),
        ("audio.Telephone", {"low": -INF}, r"low=-\.inf: a finite number"),
        ("audio.clipping", {"max_share": INF}, r"max_share=\.inf: a finite number"),
        ("audio.level", {"max_dbfs": float("nan")}, r"max_dbfs=\.nan: a finite number"),
        ("quantizer.phonemes", {"decay": 1}, "decay=1: it should be less than 1"),
        ("quantizer.phonemes", {"decay": 0}, "decay=0: it should be greater than 0"),
        ("quantizer.phonemes", {"quantize_from": -1}, "it should be greater than or equal to 0"),
        ("quantizer.phonemes", {"quantize_from": 1}, "it should be less than 1"),
        ("quantizer.whisper", {"codes": 0}, "codes=0: it should be greater than or equal to 1"),
        ("quantizer.whisper", {"codes": 70_000}, "codes=70000: it should be less than or equal"),
        ("texts.duplicates", {"permutations": 10**8}, "it should be less than or equal to 4096"),
        ("texts.length", {"max_turns": 0}, "max_turns=0: it should be greater than or equal to 1"),
        ("evals.Speech", {"batch_size": 10**9}, "batch_size=.*: it should be less than or equal"),
        *[("quantizer.phonemes", {"model": WHISPER | {k: 0}}, f"{k}=0: it should") for k in SHAPE],
        (
            "quantizer.phonemes",
            {"model": WHISPER | {"n_mels": 81}},
            "n_mels=81: a log-mel has 80 or 128",
        ),
        (
            "quantizer.phonemes",
            {"model": WHISPER | {"n_audio_head": 3}},
            "a multiple of n_audio_head",
        ),
        ("quantizer.phonemes", {"model": WHISPER | {"downsample": 3}}, "a multiple of downsample"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_name(component, values, said):
    needed = {"snr": [0, 1], "lines": "x", "voices": {}, "model": WHISPER, "whisper": "x"}
    needed |= {"db": [0, 1], "max_share": 1, "data": "x", "metric": "wer"}
    dotted = f"speechfuse.{component}"
    taken = inspect.signature(config.resolve(dotted)).parameters
    required = [name for name, of in taken.items() if of.default is of.empty]
    given = {name: needed[name] for name in required if name in needed} | values
    with pytest.raises(ValueError, match=said):
        config.instantiate({"_component_": dotted, **given})


def test_infinity_is_a_value_where_it_is_the_default():
    spec = {"_component_": "speechfuse.audio.duration", "min_seconds": 1, "max_seconds": INF}
    assert callable(config.instantiate(spec))


def holder(language: str | None = None, fused: bool | None = None, rest: Any = None) -> tuple:
    return language, fused, rest


def test_a_component_is_given_the_reading_that_it_declares(tmp_path):
    for folder in ("2024", "no"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.wav").write_bytes(b"")
    spec = {"_component_": "speechfuse.corpora.folder", "path": str(tmp_path / "no")}
    corpus = config.instantiate({**spec, "language": "no", "require_text": "no"})
    assert (corpus.language, corpus.require_text) == ("no", False)
    assert config.instantiate({**spec, "language": 47}).language == "47"
    for value, said in ((1.1, "language=1.1 is not .* in quotes"), (True, "language=True is not")):
        with pytest.raises(ValueError, match=said):
            config.instantiate({**spec, "language": value})
    with pytest.raises(ValueError, match="require_text='maybe' is not"):
        config.instantiate({**spec, "require_text": "maybe"})
    # of other packages: as YAML 1.1 has them, where no text is declared
    theirs = {"_component_": f"{__name__}.holder", "language": "no", "fused": "no", "rest": ["on"]}
    assert config.instantiate(theirs) == ("no", False, [True])


def test_what_yaml_writes_in_another_way_fits():
    noise = config.instantiate({"_component_": "speechfuse.audio.Noise", "snr": [0, 5]})
    assert noise.snr == [0, 5] and noise.folder is None


def test_a_value_of_another_file_is_there_before_overrides_reach_into_it(write, tmp_path):
    other = tmp_path / "voices.yaml"
    other.write_text("train: {accents: [a, b], deep: {variants: [x]}}\n")
    text = f"{FULL}name: ${{file:{other},train.accents.1}}\n"
    text = text.replace("split: train", f"split: '${{file:{other},train}}'")
    loaded = config.load(Job, write(text), ["corpus.split.deep.variants=[y]"])
    assert loaded.corpus["split"] == {"accents": ["a", "b"], "deep": {"variants": ["y"]}}
    assert loaded.name == "b"
    assert refusal(write(f"name: ${{file:{other},test}}")) == f"{other} has no key 'test'"
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        config.load(Job, write("name: ${file:absent.yaml,train}"), [])


def test_null_leaves_a_named_entry_out(tmp_path):
    path = tmp_path / "evaluate.yaml"
    path.write_text("out: x\ncheckpoints: []\ntasks: {a: {metric: wer}, b: {metric: cer}}\n")
    assert config.load(Evaluate, path, ["tasks.a=null"]).tasks == {"b": {"metric": "cer"}}
    with pytest.raises(ValueError, match="tasks has no aa; did you mean 'a'"):
        config.load(Evaluate, path, ["tasks.aa=null"])


def test_where_an_entry_is_left_out_the_other_shares_sum_to_1(tmp_path, capsys):
    path = tmp_path / "synthesize.yaml"
    path.write_text(
        "out: x\nvoices: {}\nquantizer: {checkpoint: q}\naugmentation: [{a: 0}, {a: 1}, {a: 2}]\n"
        "kinds: {a: {share: 0.6}, b: {share: 0.2}, c: {share: 0.2}}\n"
    )
    load = partial(config.load, SynthesizeInstructions, path)
    assert load(["kinds.a=null"]).kinds == {"b": {"share": 0.5}, "c": {"share": 0.5}}
    assert capsys.readouterr().out == "kinds: without a the shares are b 0.5, c 0.5\n"
    own = load(["kinds.c=null", "kinds.b.share=0.4", "augmentation.2=null", "augmentation.0=null"])
    assert own.kinds == {"a": {"share": 0.6}, "b": {"share": 0.4}}
    assert own.augmentation == [{"a": 1}] and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"augmentation has no 3\. Allowed"):
        load(["augmentation.3=null"])
    for later in ("augmentation.1.a=7", "augmentation[1].b=7", "augmentation.1={a: 7}"):
        with pytest.raises(ValueError) as caught:
            load(["augmentation.1=null", later])
        left_out = "an override before it left this entry out: give one of the two"
        assert str(caught.value) == f"override '{later}': {left_out}"
    with pytest.raises(ValueError, match=r"kinds has no a\. Allowed here: none"):
        config.load(SynthesizeInstructions, None, ["kinds.a=null"])


def test_optional_text_is_taken_as_it_is_but_for_null():
    load = partial(config.load, PushToHub, None)
    assert load(["path=x", "message=fix: a {b}"]).message == "fix: a {b}"
    assert load(["path=x", "message=null"]).message is None


def test_a_number_that_is_none_is_refused_everywhere():
    @dataclass
    class Job:
        rate: float = config.key("a rate", 0.1)
        rates: dict[str, float] = config.key("more", {})

    for number in ("nan", "inf"):
        with pytest.raises(ValueError, match=rf"^rate=\.{number}: a finite number is needed"):
            config.load(Job, None, [f"rate=.{number}"])
    with pytest.raises(ValueError, match=r"^rates=-\.inf: a finite number is needed"):
        config.load(Job, None, ["rates={a: -.inf}"])
    with pytest.raises(ValueError, match=r"AdamW: lr=\.inf: a finite number is needed"):
        config.bind({"_component_": "torch.optim.AdamW", "lr": INF}, "params")
    with pytest.raises(ValueError, match=r"Noise: snr=\.nan: a finite number is needed"):
        config.instantiate({"_component_": "speechfuse.audio.Noise", "snr": [float("nan"), 1.0]})

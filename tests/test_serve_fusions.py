"""`just serve`: a model of every fusion is asked over HTTP, with the encoder that it was trained
with; one that has no turns is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from speechfuse import artifact, config
from speechfuse.fusion import door, folder
from speechfuse.quantizer import frames
from speechfuse.quantizer.model import Quantizer, QuantizerConfig
from speechfuse.serve import checkpoints
from speechfuse.serve.config import Serve
from tests.small_channels import ADAPTER
from tests.test_serve import DEMO, QUANTIZER, Served, heard, part, replied, wav

WHISPER = str(DEMO.parent.parent / "tests/golden/whisper.pt")
ENCODER = {"_component_": "speechfuse.quantizer.of_whisper", "checkpoint": WHISPER, "window": 2.0}
ONE_SECOND = {"splice": 9, "rwkv": 9, "own": 9, "whisper": 17}  # positions, of 25 or 50 frames


def epoch(out: Path, base: str, encoder: frames.FrameEncoder) -> Path:
    """A model that takes frames of `encoder` through an adapter as it is before training."""
    spec = {"_component_": "speechfuse.fusion.Stack", "width": encoder.width, "stack": 3}
    spec |= {"hidden": 8}
    named = {"generator": "speechfuse.evals.SpliceGenerator", "adapter": spec}
    named |= {"encoder": encoder.identity}
    out.mkdir(parents=True)
    folder.write(out, DEMO / f"models/{base}", named, door.initial_values(spec, 160, 0), None, {})
    return out


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Serve:
    """Of a report's folder with an epoch of each fusion."""
    runs = tmp_path_factory.mktemp("fusions")
    shared = frames.of_quantizer(QUANTIZER)
    first = epoch(runs / "splice/epoch_0", "base", shared)
    epoch(runs / "rwkv/epoch_0", "rwkv", shared)
    torch.manual_seed(0)
    Quantizer(QuantizerConfig(16, 4, 2, True, 80, 100, 16, 2, 1)).save(runs / "encoder")
    own = epoch(runs / "own/epoch_0", "base", frames.of_quantizer(str(runs / "encoder")))
    (runs / "encoder").rename(own / "encoder")
    epoch(runs / "whisper/epoch_0", "base", frames.of_whisper(WHISPER, 2.0))
    two = {"generator": "speechfuse.evals.SpliceGenerator", "adapter": ADAPTER, "encoder": "e"}
    artifact.write_json(runs / "duplex/epoch_0/config.json", {})
    artifact.write_json(runs / "duplex/epoch_0/speech.json", two | {"codec": {"identity": "c"}})
    keys = {f"encoder.{name}": value for name, value in ENCODER.items()}
    keys |= {"report": runs / "report.json", "checkpoint": first, "quantizer": QUANTIZER}
    overrides = [f"{name}={value}" for name, value in keys.items()]
    return config.load(Serve, DEMO / "serve.yaml", [*overrides, "repeat_first=false"])


@pytest.fixture(scope="module")
def served(job) -> Iterator[Served]:
    server = Served(job)
    server.first()
    yield server
    server.close()


@pytest.mark.parametrize("name", ONE_SECOND)
def test_every_fusion_is_asked_in_turns(name, served, job):
    model = f"{name}/epoch_0"
    assert model in [each.id for each in served.client.models.list()]
    said: list[Any] = [{"type": "text", "text": "repeat and answer:"}, part(wav(0))]
    messages: Any = [{"role": "user", "content": said}]
    create = served.client.chat.completions.create
    answer = create(model=model, messages=messages, max_tokens=8)
    turn = "user", ["repeat and answer:", heard(wav(0))]
    listener = checkpoints.load(Path(job.report).parent / model, job, "a clip")
    assert answer.choices[0].message.content == replied(listener, turn) != ""
    assert answer.usage.prompt_tokens_details.audio_tokens == ONE_SECOND[name]
    chunks = create(model=model, messages=messages, max_tokens=8, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == answer.choices[0].message.content


def test_a_model_of_two_channels_is_refused(served, capsys):
    with pytest.raises(openai.BadRequestError) as refused:
        served.client.chat.completions.create(
            model="duplex/epoch_0", messages=[{"role": "user", "content": "a"}]
        )
    error: Any = refused.value.body
    assert (error["param"], error["code"]) == ("model", "model_not_usable")
    assert error["message"] == (
        "the model 'duplex/epoch_0' listens while it speaks and has no turns: `just duplex` talks "
        "to it"
    )
    assert "duplex/epoch_0 listens while it speaks" in capsys.readouterr().err

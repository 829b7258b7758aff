"""Round trip: what is heard decides, by whichever listener."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechfuse import openai_server, workers
from speechfuse.openai_server import Unavailable
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows.rejects import FILTERED
from speechfuse.synthesis.round_trip import (
    QuantizerDecoder,
    RoundTrip,
    SynthesizedClip,
    TranscriptionEndpoint,
    rate,
)
from tests.speech_server import SpeechServer

GOLDEN = Path(__file__).parent / "golden"
MODEL, WHISPER = str(GOLDEN / "whispervq-decoding.model"), str(GOLDEN / "whisper-decoding.pt")
RECORDED = json.loads((GOLDEN / "whisperspeech_decoding.json").read_text())["decoding"]
DECODER = {
    "_component_": "speechfuse.synthesis.QuantizerDecoder",
    "quantizer": MODEL,
    "whisper": WHISPER,
}


@pytest.mark.parametrize(
    ("text", "heard", "expected"),
    [
        ("What is 3 plus four?", "what is three plus 4", (0.0, 4)),  # "what is 3 4": as counted
        ("name the capital of france", "name the capital france", (0.2, 5)),
        ("what is", "", (1.0, 2)),
        ("um", "", (0.0, 0)),
        (" ", "well", (0.0, 0)),
        ("say it (in brief)", "say it in brief", (0.0, 4)),  # what is in brackets is said
        ("say [very] <loud>", "(say) loud", (1 / 3, 3)),
        ("It's colouring", "it's colouring दिन", (1 / 3, 3)),  # the text decides for both
    ],
)
def test_the_rate_is_of_words_as_said(text, heard, expected):
    assert rate(text, heard) == pytest.approx(expected)


def test_the_rate_of_a_language_without_spaces_is_of_characters():
    assert rate("今日は晴れ", "今日は 雨れ", characters=True) == pytest.approx((0.2, 5))


def test_a_rate_takes_no_time():
    rate(*["the normaliser reads its tables once"] * 2)
    start = time.perf_counter()
    for _ in range(100):
        rate("what is three plus four", "what is three plus")
    assert time.perf_counter() - start < 0.5


def test_the_codec_s_decoder_hears_the_codes():
    made = [
        SynthesizedClip(
            clip["text"] if i % 2 else "what is three plus four", np.array(clip["codes"]), None
        )
        for i, clip in enumerate(RECORDED)
    ]
    found = RoundTrip(DECODER, max_wer=0.5).judge(made)
    assert [verdict.transcript for verdict in found] == [clip["text"].strip() for clip in RECORDED]
    right = [verdict for i, verdict in enumerate(found) if i % 2]
    wrong = [verdict for i, verdict in enumerate(found) if not i % 2]
    assert all(v.reason is None and v.wer == 0 for v in right)
    assert all(
        v.wer > 0.5 and (v.reason or "").startswith(f"{FILTERED}round trip: ") for v in wrong
    )
    assert "more than 0.5; heard: " in (wrong[0].reason or "")


def test_the_codec_s_decoder_is_on_the_device_of_its_worker(monkeypatch):
    monkeypatch.setattr(workers, "_device", "meta")
    decoder = QuantizerDecoder(MODEL, WHISPER).decoder
    tensors = [
        *decoder.decoder.parameters(),
        *decoder.decoder.buffers(),
        *decoder.whisper.parameters(),
    ]
    assert {each.device.type for each in (*tensors, decoder.codebook)} == {"meta"}


def test_a_decoder_of_another_codec_is_refused():
    decoder = QuantizerDecoder(MODEL, WHISPER)
    own = Quantizer.load(Path(MODEL), Path(WHISPER)).identity
    decoder.check(own)
    with pytest.raises(ValueError, match=f"another codec .{own[:12]}.*0000"):
        decoder.check("0" * 64)
    cut = QuantizerDecoder(MODEL, WHISPER, window=2.0)
    cut.check(Quantizer.load(Path(MODEL), Path(WHISPER), 2.0).identity)
    assert cut.decoder.whisper.dims.n_audio_ctx == 100
    with pytest.raises(ValueError, match=f"is another codec .*{own[:12]}"):
        cut.check(own)


@pytest.fixture(scope="module")
def server():
    with SpeechServer() as running:
        yield running


def spoken(server, text: str) -> SynthesizedClip:
    samples, _ = soundfile.read(io.BytesIO(server.speak(text, "echo")), dtype="float32")
    return SynthesizedClip(text, np.zeros(1, np.uint16), samples)


def test_a_transcriber_hears_the_waveform_and_is_asked_once(server, tmp_path):
    listener = {
        "_component_": "speechfuse.synthesis.TranscriptionEndpoint",
        "url": server.url,
        "model": "asr",
        "key_variable": None,
        "cache": str(tmp_path),
    }
    made = [spoken(server, "what is six minus two"), spoken(server, "name a bird")]
    made[1] = SynthesizedClip(
        "what is six", made[1].codes, made[1].waveform
    )  # the audio says another thing
    server.faults = ["500", "429"]
    trip = RoundTrip(listener)
    trip.transcriber.check("any")
    first, second = trip.judge(made)
    assert (first.transcript, first.wer, first.reason) == ("what is six minus two", 0, None)
    assert (
        second.transcript == "name a bird"
        and second.reason
        and "heard: name a bird" in second.reason
    )
    server.hears = lambda _: "another answer"  # as a service whose model has changed
    assert RoundTrip(listener).judge(made) == [first, second]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((400, b'{"error": {"message": "Audio is too short"}}'), "refused: 400 Audio is too short"),
        ((200, b"garbage"), "not a transcript: b'garbage'"),
        ((200, b'{"text": null}'), "not a transcript: b'{\"text\": null}'"),
    ],
)
def test_what_a_server_cannot_hear_is_a_reject_of_that_one(server, monkeypatch, answer, said):
    monkeypatch.setattr(openai_server, "sleep", lambda _: None)
    made = [spoken(server, "six"), spoken(server, "name a bird"), spoken(server, "none")]
    first = made[0].waveform
    hears = server._heard
    monkeypatch.setattr(server, "hears", lambda wav: answer if len(wav) == size else hears(wav))
    file = io.BytesIO()
    soundfile.write(file, first, 16_000, format="WAV", subtype="PCM_16")
    size = len(file.getvalue())
    component = "speechfuse.synthesis.TranscriptionEndpoint"
    spec = {"_component_": component, "url": server.url, "model": "m", "key_variable": None}
    verdicts = RoundTrip(spec | {"tries": 2}).judge(made)
    assert verdicts[0].reason == f"not heard: {said}"
    assert [verdict.transcript for verdict in verdicts[1:]] == ["name a bird", "none"]
    with pytest.raises(Unavailable, match="404"):
        RoundTrip({**spec, "url": f"{server.url}/other"}).judge(made)


def test_what_cannot_work_is_said_before_it_starts(server):
    with pytest.raises(Unavailable, match="leaves no audio"):
        TranscriptionEndpoint(url=server.url, model="asr", key_variable=None).transcribe(
            [SynthesizedClip("six", np.zeros(1), None)]
        )
    with pytest.raises(ValueError, match="no connection"):
        TranscriptionEndpoint(
            url="http://127.0.0.1:9/v1", model="asr", key_variable=None, tries=1
        ).check("any")
    with pytest.raises(ValueError, match="max_wer=-1"):
        RoundTrip(DECODER, max_wer=-1)

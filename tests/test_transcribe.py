"""What a Whisper hears in files: the genuine tiny.en, codes beside it, files that are no audio."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechfuse import config
from speechfuse.audio import decoding, espeak_ng
from speechfuse.openai_server import Unavailable
from speechfuse.quantizer.decoder import CodeTranscriber
from speechfuse.quantizer.model import Quantizer
from speechfuse.synthesis.round_trip import RoundTrip, SynthesizedClip
from stages import transcribe
from stages.transcribe import Transcribe

GOLDEN = Path(__file__).parent / "golden"
CODEC, WHISPER = GOLDEN / "whispervq-decoding.model", GOLDEN / "whisper-decoding.pt"
TEXT = "The red cat sat on the green table."


@pytest.fixture(scope="module")
def said() -> np.ndarray:
    with espeak_ng.EspeakLibrary() as engine:
        return engine.speak(TEXT, espeak_ng.EspeakVoice("en-us")).waveform


def write(path: Path, waveform: np.ndarray) -> str:
    soundfile.write(path, waveform, 16_000, subtype="FLOAT")
    return str(path)


def test_tiny_en_hears_files_of_any_length_and_judges_clips(tiny_en, said, tmp_path, capsys):
    short = write(tmp_path / "short.wav", said)
    pause = np.zeros(128_000, np.float32)
    long = write(tmp_path / "long.wav", np.concatenate([*[said, pause] * 4]))
    assert soundfile.info(long).duration > 35
    transcribe.main(Transcribe([short, long], str(tiny_en)))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{short}: {TEXT}"
    assert second.startswith(f"{long}: The") and second.count(TEXT[:-1]) == 4
    whisper = {"_component_": "speechfuse.synthesis.Whisper", "whisper": str(tiny_en)}
    trip, codes = RoundTrip(whisper), np.zeros(1, np.uint16)
    texts = ("the red cat sat on the green table", "what is three plus four")
    right, wrong = trip.judge([SynthesizedClip(text, codes, said) for text in texts])
    assert (right.transcript, right.wer, right.reason) == (TEXT, 0, None)
    assert wrong.wer > 0.9 and f"are wrong, more than 0.3; heard: {TEXT}" in str(wrong.reason)
    trip.transcriber.check("any codec")
    assert trip.transcriber.identity().keys() == {"listener", "sha256", "language"}
    with pytest.raises(Unavailable, match="leaves no audio"):
        trip.judge([SynthesizedClip(TEXT, codes, None)])


def test_codes_are_transcribed_beside_it(said, tmp_path, capsys):
    files = [write(tmp_path / f"{i}.wav", said[i * 4000 :]) for i in range(2)]
    files.append(write(tmp_path / "point.wav", said[:500]))  # no code long
    job = Transcribe(files, str(WHISPER), str(CODEC), 1.0)
    with pytest.raises(SystemExit, match="1"):
        transcribe.main(job)
    out, err = capsys.readouterr()
    quantizer = Quantizer.load(CODEC, WHISPER, 1.0)
    codec = CodeTranscriber.load(CODEC, WHISPER, window=1.0)
    lines = out.splitlines()
    for file, heard, of_codes in zip(files, lines[::2], lines[1::2], strict=False):
        pieces = decoding.split(decoding.load(Path(file)), 1.0)
        assert heard.startswith(f"{file}: ") and len(pieces) > 1
        texts = [text.strip() for text in codec.transcribe(quantizer.encode(pieces))]
        assert of_codes == f"  of its codes: {' '.join(texts)}" and all(texts)
    assert len(lines) == 5 and f"error: {files[2]}: waveform 0 has 0.03 s" in err


def test_files_that_cannot_be_read_do_not_stop_the_others(said, tmp_path, capsys, monkeypatch):
    good, absent = write(tmp_path / "good, [1].wav", said[:8000]), str(tmp_path / "absent.wav")
    (tmp_path / "text.wav").write_text("no audio")
    arguments = [absent, good, str(tmp_path / "text.wav"), f"whisper={WHISPER}"]
    monkeypatch.setattr("sys.argv", ["transcribe", *arguments])
    with pytest.raises(SystemExit) as stopped:
        config.main(transcribe.main, Transcribe, transcribe.__doc__, ("files",))
    out, err = capsys.readouterr()
    assert stopped.value.code == 1 and out.startswith(f"{good}: ") and out.count("\n") == 1
    absent_said, text_said = err.splitlines()
    assert absent_said == f"error: no audio file at {absent}"
    assert text_said.startswith(f"error: {tmp_path / 'text.wav'} is not a readable audio file: ")
    with pytest.raises(SystemExit, match="2"):
        transcribe.main(Transcribe([absent], str(WHISPER)))
    with pytest.raises(FileNotFoundError, match=r"no Whisper at x\.pt: just fetch-whisper tiny"):
        transcribe.main(Transcribe([good], "x.pt"))
    (tmp_path / "x.pt").write_text("hello")  # bytes at which torch's reader raises a KeyError
    with pytest.raises(ValueError, match="is not a Whisper checkpoint: it is no torch file"):
        transcribe.main(Transcribe([good], str(tmp_path / "x.pt")))
    with pytest.raises(ValueError, match="window=2 is of use only to a quantizer"):
        transcribe.main(Transcribe([good], str(WHISPER), window=2))

"""Voice engines: whole texts, pure functions, voices in their shares, endpoints that fail."""

import hashlib
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from speechfuse import config, openai_server
from speechfuse.openai_server import Unavailable
from speechfuse.synthesis import plan as synthesis_plan
from speechfuse.synthesis.engines import sentences
from speechfuse.synthesis.engines.endpoint import Endpoint
from speechfuse.synthesis.engines.espeak import UNSTEADY, Espeak
from tests.speech_server import KEY, SpeechServer

TEXT = "What is three plus four? Name the capital of France, please. Why?"


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        (TEXT, None, [TEXT]),
        (TEXT, len(TEXT), [TEXT]),
        (TEXT, len(TEXT) - 1, [TEXT[:60], "Why?"]),
        (TEXT, 36, ["What is three plus four?", "Name the capital of France, please.", "Why?"]),
        ("He said (e.g. this). Then\n he left.", 21, ["He said (e.g. this).", "Then he left."]),
        (
            "He met Dr. Who. So did I. In the U.S. Army? E.g. J. R. did.",
            17,
            ["He met Dr. Who.", "So did I.", "In the U.S. Army?", "E.g. J. R. did."],
        ),
        ("你好。再见。", 9, ["你好。", "再见。"]),
    ],
)
def test_text_is_split_at_sentences_and_nothing_is_lost(text, limit, pieces):
    found = sentences(text, limit)
    assert found == pieces
    assert "".join("".join(found).split()) == "".join(text.split())


def test_a_sentence_over_the_limit_is_refused_not_cropped():
    with pytest.raises(ValueError, match=r"^too long: a sentence of 35 characters, 34 can"):
        sentences(TEXT, 34)
    with pytest.raises(ValueError, match=r"^too long: a sentence of 9 "):
        sentences("你好。", 8)  # bytes: what WhisperSpeech counts


def test_what_no_window_could_hold_is_refused_before_espeak_says_it():
    with pytest.raises(ValueError, match=r"^too long: a sentence of "):
        sentences("and " * 40_000, Espeak(["m3"]).max_characters)


def test_every_voice_has_its_exact_share_of_all_and_nearly_of_each_kind():
    kinds = ["ask"] * 7000 + ["transcribe"] * 2500 + ["noise"] * 503
    shares = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
    found = synthesis_plan.assign(kinds, shares, 1)
    assert Counter(found) == synthesis_plan.counts(10_003, shares)
    assert synthesis_plan.counts(10_003, shares) == {"a": 5002, "b": 3001, "c": 1500, "d": 500}
    for kind in set(kinds):
        of_kind = Counter(v for k, v in zip(kinds, found, strict=True) if k == kind)
        for voice, share in shares.items():
            assert abs(of_kind[voice] - share * kinds.count(kind)) < 3
    first = Counter(found[:1000])  # and a voice is not a stretch of the dataset
    assert all(abs(first[voice] - 1000 * share) < 80 for voice, share in shares.items())
    assert (
        synthesis_plan.assign(kinds, shares, 1) == found != synthesis_plan.assign(kinds, shares, 2)
    )


def test_a_hundred_voices_for_few_segments_are_as_even_as_can_be():
    found = synthesis_plan.assign(["ask", "tell"] * 75, dict.fromkeys(range(100), 0.01), 0)
    assert sorted(Counter(Counter(found).values()).items()) == [(1, 50), (2, 50)]


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}])
def test_shares_that_do_not_add_up_are_refused(shares):
    with pytest.raises(ValueError, match="together 1"):
        synthesis_plan.assign(["ask"], shares, 0)


SAME = """
import hashlib
from speechfuse.synthesis.engines.espeak import Espeak
engine = Espeak(["m3"], ["en-us"])
print(hashlib.sha256(engine.speak("six minus two", "en-us+m3", 7).waveform.tobytes()).hexdigest())
"""


def test_espeak_says_the_same_whatever_it_said_before_and_in_another_process():
    engine = Espeak(["Annie", "m3"], ["en-us", "en-gb-scotland"])
    engine.check()
    assert len(engine.voices()) == 4
    first = engine.speak("six minus two", "en-us+m3", 7)
    for voice in engine.voices():
        engine.speak("something else", voice, 1)
    again = engine.speak("six minus two", "en-us+m3", 7)
    np.testing.assert_array_equal(first.waveform, again.waveform)
    assert first.waveform.dtype == np.float32 and first.codes is None
    assert 140 <= first.about["rate"] <= 215 and first.about == again.about
    other = engine.speak("six minus two", "en-us+m3", 8)
    assert other.about != first.about and len(other.waveform) != len(first.waveform)
    there = subprocess.run([sys.executable, "-c", SAME], capture_output=True, text=True, check=True)
    one = Espeak(["m3"], ["en-us"]).speak("six minus two", "en-us+m3", 7).waveform
    assert there.stdout.strip() == hashlib.sha256(one.tobytes()).hexdigest()


def test_two_espeak_engines_in_two_threads_do_not_disturb_each_other():
    engines = [Espeak(["Annie"], ["en-us"]), Espeak(["m3"], ["en-us"])]
    jobs = [(i % 2, f"number {i}") for i in range(16)]

    def speak(job: tuple[int, str]) -> np.ndarray:
        spoken = engines[job[0]].speak(job[1], engines[job[0]].voices()[0], 0)
        assert spoken.waveform is not None
        return spoken.waveform

    with ThreadPoolExecutor(4) as pool:
        for alone, together in zip(map(speak, jobs), pool.map(speak, jobs), strict=True):
            np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize(("variant", "said"), [("Nobody", "no voice"), (UNSTEADY[0], "different")])
def test_voices_that_espeak_lacks_or_cannot_repeat_are_refused_before_work(variant, said):
    with pytest.raises(ValueError, match=said):
        Espeak([variant], ["en-us"]).check()


def test_text_without_sound_is_a_reject():
    with pytest.raises(ValueError, match=r"^no sound: ") as caught:
        Espeak(["m3"], ["en-us"]).speak(" ", "en-us+m3", 0)
    assert not isinstance(caught.value, Unavailable)


@pytest.fixture(scope="module")
def running():
    with SpeechServer(KEY) as server:
        yield server


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai_server, "sleep", lambda _: None)
    running.faults, running.log[:] = [], []
    return running


def engine_of(server, **changes) -> Endpoint:
    settings = {"url": server.url, "model": "tts", "names": ["alloy", "echo"], "timeout": 5.0}
    return config.instantiate(
        {"_component_": "speechfuse.synthesis.Endpoint", **settings, **changes}
    )


def test_an_endpoint_is_asked_as_the_protocol_says_and_its_audio_is_decoded(server):
    engine = engine_of(server, speed=[0.8, 1.2], body={"instructions": "calm"}, send_seed=True)
    engine.check()
    assert [request["voice"] for request in server.log] == ["alloy", "echo"]
    spoken = engine.speak("six minus two", "echo", 5)
    speed = spoken.about["speed"]
    assert 0.8 <= speed <= 1.2 and engine.speak("six", "echo", 6).about["speed"] != speed
    assert server.log[2] == {
        "model": "tts",
        "input": "six minus two",
        "voice": "echo",
        "response_format": "wav",
        "instructions": "calm",
        "speed": speed,
        "seed": 5,
    }
    assert spoken.waveform.dtype == np.float32 and len(spoken.waveform) > 8000
    assert KEY not in str(vars(engine)) + str(engine.identity())


def test_passing_faults_are_tried_again_counted_and_said(server, capsys):
    engine = engine_of(server, timeout=0.4)
    expected = engine.speak("six minus two", "alloy", 0).waveform
    server.faults = ["429", "500", "slow", "truncated", "broken"]
    np.testing.assert_array_equal(engine.speak("six minus two", "alloy", 0).waveform, expected)
    assert server.faults == []
    said = capsys.readouterr().err.splitlines()
    assert [line.split("; asked again, ")[1] for line in said] == [
        f"{count} times so far in this process" for count in (1, 2, 4)
    ]
    assert "429 fault 429" in said[0] and "500" in said[1]


@pytest.mark.parametrize(
    ("faults", "said", "stops"),
    [
        (["500"] * 9, "/v1/audio/speech: 500 fault 500, asked 3 times", True),
        (["429"] * 9, "429 fault 429, asked 3 times", True),
        (["slow"] * 9, "no answer in 0.2 s, asked 3 times", True),
        (["truncated"] * 9, "^truncated: ", False),
        (["text"] * 9, "^not audio: ", False),
    ],
)
def test_what_does_not_pass_ends_in_a_sentence(server, faults, said, stops):
    """A server that is not there ends the job; a text that it cannot say is a reject."""
    engine = engine_of(server, timeout=0.2 if faults[0] == "slow" else 5.0, tries=3)
    server.faults = list(faults)
    with pytest.raises(ValueError, match=said) as caught:
        engine.speak("six", "alloy", 0)
    assert isinstance(caught.value, Unavailable) is stops
    assert len(server.faults) == len(faults) - 3


def test_voice_key_path_and_server_that_are_not_there_are_said_before_work(server, monkeypatch):
    with pytest.raises(ValueError, match=r"voice 'nova', model 'tts'.*refused: 400 voice nova"):
        engine_of(server, names=["nova"]).check()
    with pytest.raises(Unavailable, match="404 no such path; check url"):
        engine_of(server, url=f"{server.url}/other").speak("six", "alloy", 0)
    with pytest.raises(ValueError, match=r"127.0.0.1:9/v1.*no connection .*refused"):
        engine_of(server, url="http://127.0.0.1:9/v1", tries=1).check()
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(ValueError, match="401 Incorrect API key provided; check OPENAI_API_KEY"):
        engine_of(server).check()
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(Unavailable, match="OPENAI_API_KEY is not set"):
        engine_of(server).check()


@pytest.mark.parametrize(
    "url",
    ["https://name:secret@host/v1", "https://host/v1?api_key=secret", "https://host/v1#secret"],
)
def test_a_url_with_a_key_in_it_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match=r"url=https://host\.\.\.: write it as") as caught:
        Endpoint(url=url, model="tts", names=["alloy"])
    assert "secret" not in str(caught.value)


def test_what_was_received_once_is_not_asked_for_again(server, tmp_path):
    first = engine_of(server, cache=str(tmp_path)).speak("six", "alloy", 0)
    asked = len(server.log)
    again = engine_of(server, cache=str(tmp_path)).speak("six", "alloy", 0)
    np.testing.assert_array_equal(first.waveform, again.waveform)
    assert len(server.log) == asked == 1
    engine_of(server, cache=str(tmp_path)).speak("six", "alloy", 1)  # another sample of it
    assert len(server.log) == 2


def test_a_server_that_asks_to_wait_is_given_the_time(server, monkeypatch):
    server.retry_after = 0.4
    server.faults = ["429", "429"]
    waits: list[float] = []
    monkeypatch.setattr(openai_server, "sleep", waits.append)
    engine_of(server).speak("six", "alloy", 0)
    server.retry_after = 0.05
    assert waits == [0.4, 0.4]


def test_nothing_of_the_environment_is_sent_but_the_key_that_is_named(server, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer other\nX-More: x")
    engine_of(server).speak("six", "alloy", 0)
    sent = server.headers[-1]
    assert sent["authorization"] == f"Bearer {KEY}"
    assert not sent.keys() & {"openai-organization", "openai-project", "x-more"}


def test_a_long_retry_after_does_not_end_the_job(server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(openai_server, "sleep", waits.append)
    server.retry_after, server.faults = 300, ["429", "429"]
    engine_of(server, tries=3).speak("six", "alloy", 0)
    server.retry_after = 0.05
    assert waits == [60, 60]


def test_no_log_holds_the_key_or_the_text(server, caplog):
    with caplog.at_level("DEBUG"):
        engine_of(server).speak("six minus two", "alloy", 0)
    said = "\n".join(record.getMessage() + str(record.args) for record in caplog.records)
    assert "/v1/audio/speech" in said and KEY not in said and "six minus two" not in said


def test_a_key_of_the_environment_is_not_sent_where_none_is_asked_for(server):
    with SpeechServer() as open_server:
        engine_of(open_server, key_variable=None).speak("six", "alloy", 0)
        assert open_server.keys == [None]

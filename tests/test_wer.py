"""AudioBench's WER: what its normaliser makes of odd texts, the numbers beside the rate, the job.

AudioBench's published logs are not in this repository; their words are LibriSpeech's, their shape
is that of `LOG` below.
"""

import json
import sys
import unicodedata
from dataclasses import astuple
from pathlib import Path

import jiwer
import pytest

from speechfuse import config
from speechfuse.scores import audiobench_wer
from speechfuse.scores.word_errors import whisper_english
from stages import score_wer

ODD = [
    ("John's car", "john is car"),
    ("20 percent", "twenty"),
    ("5%", "five"),
    ("$5.50", "$fivefifty"),
    ("£20", "£twenty"),
    ("3.5 miles", "threefive miles"),
    ("100", "100"),
    ("10", "ten"),
    ("007", "seven"),
    ("ninety, then ninety nine", "ninety then 99"),
    ("Twenty-one, please", "21 please"),
    ("nineteen eighty four", "1984"),
    ("one hundred and one of 1,000 men", "101 of 1000 men"),
    ("the 1960s, the 21st", "the 1960s the 21st"),
    ("9, 30", "nine thirty"),
    ("o'clock", "zero clock"),
    ("Dr. Smith and Mrs. Brown", "doctor smith and missus brown"),
    ("I'M not sure; he doesn't know. That's all!", "i am not sure he does not know that is all"),
    ("I can't, won't, ain't gonna", "i can not will not aint going to"),
    ("let's go, it's been fun", "let us go it has been fun"),
    ("the officers' mess", "the officers mess"),
    ("the [noise] dog (sighs) <unk> ran", "the dog ran"),
    ("Um, uh, umm, er... ah! mhm hmm", ""),
    ("the COLOUR of the theatre", "the color of the theater"),
    ("Zoë's naïve café", "zoe is naive cafe"),
    ("\uff11\uff10 \u201cempty\u201d a_b c/d", "ten empty a b c d"),
    ("  two \n  spaces\t ", "two spaces"),
    (" ", ""),
]
# as in a published log: normalised, with the few texts that would not survive it again
LOG = [("she ran back at once", "she ran back at once")] * 150 + [
    ("he paid $sixty in all", "he paid sixty in all"),
    ("the years nine thirty and seven", "the years nine thirty and seven"),
    ("empty", "thank you"),
]


@pytest.mark.parametrize(("text", "expected"), ODD)
def test_odd_texts_become_what_audiobench_makes_of_them(text, expected):
    assert audiobench_wer.audiobench(text) == expected


def test_the_steps_left_out_have_nothing_to_do():
    """AudioBench goes on to expand contractions and drop brackets; none is left by then."""
    marks = [c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c)[0] == "P"]
    marks += "<>`$+|"
    left = set()
    for c in marks:
        left |= set(whisper_english()(f"a{c}a {c}a a{c} can{c}t (b{c}"))
    assert len(marks) > 700 and "'" in marks and "[" in marks
    assert {c for c in left if not (c.isalnum() or c == " ")} <= set(".%$")


def test_small_numbers_and_tens_become_words_and_others_stay():
    for number in range(200):
        made = audiobench_wer.audiobench(str(number))
        spelled = number <= 20 or (number < 100 and number % 10 == 0)
        assert made.isalpha() == spelled and (spelled or made == str(number))


def test_the_rate_is_errors_over_words_and_an_empty_side_is_the_word_empty():
    result = audiobench_wer.score(
        ["the cat sat", "um", "a dog"], ["the cat sat down", "(noise)", "uh"]
    )
    assert result.per_item == [(1, 3), (0, 1), (2, 2)]  # nothing for nothing is right
    assert result.value == 3 / 6 and result.low <= result.value <= result.high
    assert result.totals == (1, 1, 1, 6)  # substitutions, deletions, insertions, words


def test_loops_show_in_the_capped_rate_and_the_share_above_one():
    result = audiobench_wer.score(
        ["dog", "the cat sat here"], ["dog dog dog dog", "the cat sat here"]
    )
    assert result.value == pytest.approx(3 / 5) and result.capped == pytest.approx(1 / 5)
    assert result.above_one == 0.5


def test_rates_by_duration_are_those_of_their_utterances():
    references = ["a b", "a b", "a b c d"]
    result = audiobench_wer.score(references, ["a b", "a", "x b c d"], seconds=[4.0, 5.0, 31.5])
    assert result.by_duration == [("0-5 s", 0.25, 2), ("over 30 s", 0.25, 1)]
    assert audiobench_wer.score(references, references).by_duration == []
    every = audiobench_wer.score(["a"] * 6, ["a"] * 6, seconds=[1, 6, 11, 16, 21, 40]).by_duration
    assert [label for label, _, _ in every] == [
        "0-5 s",
        "5-10 s",
        "10-15 s",
        "15-20 s",
        "20-30 s",
        "over 30 s",
    ]


def test_speakers_widen_the_interval():
    references, heard = ["the dog says woof"] * 80, ["the dog says woof"] * 40 + ["the cow"] * 40
    speakers = [f"speaker {i // 10}" for i in range(80)]
    alone, together = (
        audiobench_wer.score(references, heard),
        audiobench_wer.score(references, heard, clusters=speakers),
    )
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_character_errors_in_any_script():
    pairs = ["你好\uff0c世界", "Straße 5"], ["你好 世间", "strasse5"]
    result = audiobench_wer.score(
        *pairs, normalise=audiobench_wer.characters, align=jiwer.process_characters
    )
    assert result.per_item == [(1, 4), (0, 8)]
    assert audiobench_wer.characters("นี่") == "นี่"  # vowels above a letter are not punctuation


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([], []), "no utterances"),
        ((["a"], ["a", "b"]), "1 references and 2 hypotheses"),
        ((["a"], ["a"], [1.0, 2.0]), "2 durations of 1 utterances"),
        ((["a"], ["a"], None, ["x", "y"]), "2 clusters for 1 items"),
    ],
)
def test_what_has_no_rate_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        audiobench_wer.score(*arguments)


def write(path: Path, pairs: list[tuple[str, str]], **more: object) -> Path:
    rows = [{"reference": r, "prediction": p, **more} for r, p in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def last_line(job: score_wer.ScoreWer, capsys: pytest.CaptureFixture[str]) -> str:
    score_wer.main(job)
    return capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_is_the_rate_and_nothing_else(tmp_path, capsys):
    pairs = [("John's car", "JOHN IS CAR."), ("10 men", "ten men"), ("a b c d e", "a b c x e")]
    path = write(tmp_path / "raw.jsonl", pairs)
    assert last_line(score_wer.ScoreWer(str(path)), capsys) == "0.100000"


def test_a_published_log_is_scored_as_it_is(tmp_path, capsys):
    path = str(write(tmp_path / "log.jsonl", LOG))
    words = 150 * 5 + 5 + 6 + 1
    assert last_line(score_wer.ScoreWer(path), capsys) == f"{3 / words:.6f}"
    again = last_line(score_wer.ScoreWer(path, normalised=False), capsys)
    assert again == f"{2 / (words - 1):.6f}"  # $sixty is right now, and nine thirty one word
    raw = write(tmp_path / "raw.jsonl", [*LOG, ("It's nine-thirty.", "it is 930")])
    assert last_line(score_wer.ScoreWer(str(raw)), capsys) == f"{2 / (words + 2):.6f}"
    few = write(tmp_path / "few.jsonl", [("nineteen eighty four", "1984")] + [("yes", "yes")] * 9)
    assert last_line(score_wer.ScoreWer(str(few)), capsys) == "0.000000"


@pytest.mark.parametrize(
    ("pairs", "rate"),
    [
        ([("की", "का"), ("दिन", "दान"), ("पानी", "पीना"), ("मेरा", "मारी")], "1.000000"),
        ([("l'été est passé", "l'ete est passe"), ("il est né", "il est ne")], "0.428571"),
        ([("पानी दो।", "पानी दो")] * 3, "0.000000"),
        ([("你好世界。", "你好世间")], "0.250000"),
        ([("كَتَبَ", "كُتِبَ")], "1.000000"),
        ([("می‌خواهم", "میخواهم")], "0.000000"),
        ([("один, два", "один три")], "0.500000"),
        ([("Zoë's café is shut today", "zoe is cafe is shut today")], "0.000000"),
        ([("a café", "a cafe"), ("café naïve", "cafe naive")], "0.000000"),
        ([("Malmö and Göteborg", "malmo and goteborg"), ("over Köln", "over koln")], "0.000000"),
        ([("tôi là sinh viên", "toi la sinh vien")], "0.750000"),
        # the reference decides for both sides
        ([("It's what they're colouring.", "it's what they're colouring दिन")], "0.166667"),
    ],
)
def test_marks_and_letters_of_other_languages_count(tmp_path, capsys, pairs, rate):
    path = write(tmp_path / "a.jsonl", pairs)
    job = score_wer.ScoreWer(str(path), normalised=False)
    assert last_line(job, capsys) == rate


@pytest.mark.parametrize("space", ["\t", "\u00a0", "\n", "\u3000", " \u2028"])
@pytest.mark.parametrize("normalised", [None, True, False])
def test_any_white_space_parts_words(tmp_path, capsys, space, normalised):
    path = write(tmp_path / "a.jsonl", [(f"three{space}plus four", f"three plus{space}four")])
    assert last_line(score_wer.ScoreWer(str(path), normalised), capsys) == "0.000000"


@pytest.mark.parametrize(
    ("references", "said"),
    [
        (["की", "दिन"], "2 of 2 references are not English: "),
        (["ฉันรักแมว"], "1 of 1 references are not English: "),
        (["今天", "it is warm"], "1 of 2 references are not English: "),
        (["l'été est passé", "il est né"], "2 of 2 references are not English: "),
        (["it is warm", "café naïve"], ""),
    ],
)
def test_the_normaliser_of_another_language_is_named(tmp_path, capsys, references, said):
    path = write(tmp_path / "a.jsonl", [(text, text) for text in references])
    score_wer.main(score_wer.ScoreWer(str(path)))
    shown = capsys.readouterr().out
    assert shown.startswith(said) and ("not English" in shown) == bool(said)


def test_seconds_and_speakers_are_used_where_every_line_has_them(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [("a dog", "a cat")] * 4, seconds=3.5, speaker="s")
    score_wer.main(score_wer.ScoreWer(str(path)))
    shown = capsys.readouterr().out
    assert "0-5 s: 0.500000 (4 utterances)" in shown and "0.500000 to 0.500000" in shown
    assert "8 words: 4 substitutions, 0 deletions, 0 insertions" in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no file at"),
        ("", "holds no rows"),
        ('{"reference": "a", "prediction": "b"}\nnonsense\n', "line 2: not JSON"),
        (
            '\n{"reference": "a"}',
            'line 2: prediction must be a text; the line is {"reference": "a"}',
        ),
        ('["a", "b"]', "it is a JSON array, and not one object a line"),
        ('{"reference": "a", "prediction": null}', "line 1: prediction must be a text"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, monkeypatch, capsys, text, says):
    path = tmp_path / "a.jsonl"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["score_wer", f"file={path}"])
    with pytest.raises(SystemExit) as stopped:
        config.main(score_wer.main, score_wer.ScoreWer, "")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and says in error and error.count("\n") == 1


def test_a_result_is_plain_numbers():
    """So that it can be written as JSON."""
    json.dumps(astuple(audiobench_wer.score(["a dog"], ["a cat"], seconds=[1.0], clusters=["x"])))

"""What curation keeps, rewrites and drops: planted dirt, each step alone, the job."""

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from speechfuse import artifact
from speechfuse.config import main
from speechfuse.hub import data as hub_data
from speechfuse.rows import making, rejects, shards
from speechfuse.texts.conversations import Conversation, Turn
from speechfuse.texts.curation.answers import Answers
from speechfuse.texts.curation.duplicates import Duplicates
from speechfuse.texts.curation.language import Language
from speechfuse.texts.curation.length import Length
from speechfuse.texts.curation.normalization import normalize
from speechfuse.texts.curation.overlap import Overlap
from speechfuse.texts.curation.speakable import Speakable, unspeakable
from speechfuse.texts.curation.step import Dropped
from speechfuse.texts.curation.turns import Turns
from speechfuse.texts.files import Documents
from stages import curate_texts
from tests import dirty_texts

ROOT = Path(__file__).parent.parent
STEP_OF = {  # kind of dirt: the steps that may drop it
    "as an AI": "answers",
    "deaf answer": "answers",
    "repetition": "answers",
    "code": "speakable",
    "emoji": "speakable",
    "latex": "speakable",
    "long word": "speakable",
    "markup": "speakable",
    "number": "speakable",
    "several turns": "speakable",
    "symbol": "speakable",
    "table": "speakable",
    "unicode": "speakable",
    "url": "speakable",
    "empty answer": "turns",
    "empty prompt": "turns",
    "order": "turns",
    "system message": "turns",
    "unanswered": "turns",
    "evaluation": "overlap",
    "language": "language",
    "length": "length",
    "near-duplicate": "duplicates",
}


def said(prompt: str, answer: str = "This is what there is to say of it.") -> Conversation:
    return Conversation("a/0", [Turn("user", prompt), Turn("assistant", answer)], "a")


def step(name: str, **options) -> dict:
    return {"_component_": f"speechfuse.texts.{name}", **options}


def columns(path: str, **options) -> dict:
    return {"_component_": "speechfuse.texts.Columns", "path": path, **options}


def run(monkeypatch, folder: Path, job: dict, *overrides: str) -> int:
    """Exit status of the job, run in this process."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["curate_texts", str(path), *overrides])
    try:
        main(curate_texts.main, curate_texts.CurateTexts, curate_texts.__doc__ or "")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def rejects_of(out: Path) -> dict[str, str]:
    paths = shards.shard_paths(out)
    return {each["id"]: each["reason"] for path in paths for each in rejects.read_rejects(path)}


def hashes(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("shard-*"))}


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """(labels, folder) of planted dirt that has been curated."""
    folder = tmp_path_factory.mktemp("dirty")
    labels = dirty_texts.write(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, folder, dirty_texts.job(folder)) == 0
    return labels, folder


def test_the_set_is_large_and_has_every_kind(dirty):
    labels, _ = dirty
    assert len(labels) >= 2000
    dropped = {label.kind for label in labels if label.expect == "drop"}
    assert dropped == set(STEP_OF)
    assert sum(label.expect != "drop" for label in labels) > 1000
    assert sum(label.expect == "rewrite" for label in labels) > 300


def test_nothing_unspeakable_is_spoken_and_nothing_good_is_lost(dirty):
    labels, folder = dirty
    curated = dirty_texts.curated(folder / "curated")
    table, wrong = dirty_texts.outcomes(labels, curated)
    assert not any(outcome.unspeakable or outcome.misread for outcome in table.values()), wrong
    good = sum(label.expect != "drop" for label in labels)
    assert sum(outcome.lost for outcome in table.values()) <= 0.005 * good, wrong
    assert not [c.id for c in curated for text in c.prompts if unspeakable(text)]


def test_every_kind_is_dropped_by_the_step_that_is_meant_for_it(dirty):
    labels, folder = dirty
    reasons = {
        int(id.rpartition("/")[2]): why for id, why in rejects_of(folder / "curated").items()
    }
    found = defaultdict(set)
    for label in labels:
        if label.expect == "drop":
            found[label.kind].add(reasons[label.row].split()[1])
    assert found == {kind: {step} for kind, step in STEP_OF.items()}


def test_what_was_rewritten_keeps_its_first_text(dirty):
    labels, folder = dirty
    lines = (folder / "texts.jsonl").read_text("utf-8").split("\n")
    rewritten = 0
    for conversation in dirty_texts.curated(folder / "curated"):
        messages = json.loads(lines[int(conversation.id.rpartition("/")[2])])["messages"]
        original = conversation.extra.get("original", {})
        for number, turn in enumerate(conversation.turns):
            assert original.get(str(number), turn.text) == messages[number]["content"].strip()
        rewritten += bool(original)
        assert bool(original) <= bool(conversation.extra.get("rewrites"))
    cut = sum(label.kind == "unanswered" for label in labels if label.expect == "rewrite")
    assert rewritten == sum(label.expect == "rewrite" for label in labels) - cut


def test_totals_add_up(dirty):
    labels, folder = dirty
    manifest = artifact.manifest_of(folder / "curated")
    totals = manifest["totals"]
    assert totals["rows_in"] == len(labels)
    assert (
        totals["rows"]
        == len(dirty_texts.curated(folder / "curated"))
        == totals["steps"][-1]["kept"]
    )
    left = len(labels)
    for step in totals["steps"]:
        left -= sum(step["dropped"].values())
        assert step["kept"] == left
    assert [step["step"] for step in totals["steps"]] == [
        "turns",
        "overlap",
        "answers",
        "speakable",
        "language",
        "length",
        "duplicates",
    ]
    assert totals["steps"][3]["rewritten"]["emoji"] >= 56
    assert totals["steps"][1]["evaluation_prompts"] == {"evaluation": 60}
    assert totals["licence"] == "cc0-1.0" and totals["licences"] == {"texts": "cc0-1.0"}
    assert set(manifest["inputs"]) == {"texts.0", "overlap.evaluation"}


def test_what_is_made_again_has_the_same_bytes_and_shards_make_no_difference(
    dirty, tmp_path, monkeypatch, capsys
):
    lines = (dirty[1] / "texts.jsonl").read_text("utf-8").split("\n")[:-1]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines[-2800::7]), "utf-8")
    (tmp_path / "evaluation.jsonl").write_bytes((dirty[1] / "evaluation.jsonl").read_bytes())
    job, out = dirty_texts.job(tmp_path) | {"shard_size": 100}, tmp_path / "curated"
    assert run(monkeypatch, tmp_path, job) == 0
    before, totals = hashes(out), artifact.manifest_of(out)["totals"]
    assert len(before) == 8 and totals["steps"][-1]["dropped"]
    capsys.readouterr()
    assert run(monkeypatch, tmp_path, job) == 0
    assert capsys.readouterr().out == f"{out}: complete, nothing to do\n"
    for name in ("manifest.json", "shard-00002.parquet", "shard-00000.parquet"):
        (out / name).unlink()
    assert run(monkeypatch, tmp_path, job) == 0
    assert hashes(out) == before and artifact.manifest_of(out)["totals"] == totals
    other = {**job, "out": str(tmp_path / "other"), "shard_size": 10_000}
    assert run(monkeypatch, tmp_path, other) == 0
    assert dirty_texts.curated(tmp_path / "other") == dirty_texts.curated(out)


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("What is 5 + 3 * 2 - 1 = ?", "What is 5 plus 3 times 2 minus 1 equals?"),
        ("What is 12-5?", "What is 12 minus 5?"),
        ("Read pages 12-15.", "Read pages 12 to 15."),
        ("roughly 700-1000 calories", "roughly 700 to 1000 calories"),
        ("Solve 10X + 5 = 2y", "Solve 10X plus 5 equals 2y"),
        ("x^2 + y^2 = 25", "x squared plus y squared equals 25"),
        ("2^10 or √16?", "2 to the power of 10 or the square root of 16?"),
        (
            "$5-$10, a $10 bill, $20-bills, $.25, 6$, $40k and $2.5 million",
            "5 to 10 dollars, a 10 dollar bill, 20 dollar bills, 0.25 dollars, 6 dollars, 40 "
            "thousand dollars and 2.5 million dollars",
        ),
        ("½ of 2 1/2 and 3/10", "one half of 2 and one half and three tenths"),
        ("4km/hr, 3 MB/minute", "4 kilometers per hour, 3 MB per minute"),
        (
            "a 1 : 2 : 5 mix, a ratio of 3:5, at 10:30",
            "a 1 to 2 to 5 mix, a ratio of 3 to 5, at 10:30",
        ),
        (
            "a $1.5bn deal, $3.2tn, £1.5bn and $5m",
            "a 1.5 billion dollar deal, 3.2 trillion dollars, 1.5 billion pounds and 5 million "
            "dollars",
        ),
        ("a $20 million-dollar home for $5 dollars", "a 20 million dollar home for 5 dollars"),
        ("What is 3/4 + 1/8?", "What is three quarters plus one eighth?"),
        ("What is 3/4 as a decimal?", "What is three quarters as a decimal?"),
        ("1/2 or 3/4 cup", "one half or three quarters cup"),
        ("Is 2/3 of it more than 1/2?", "Is two thirds of it more than one half?"),
        ("5 Ω, 1 Ω and Ω", "5 ohms, 1 ohm and omega"),
        ("5cm² is a², 3m³", "5cm squared is a squared, 3m cubed"),
        (
            "65536 colors and 10000",
            "sixty-five thousand five hundred and thirty-six colors and ten thousand",
        ),
        (
            "AT&T, C++, C#, 24/7, TV/radio",
            "AT and T, C plus plus, C sharp, twenty four seven, TV or radio",
        ),
        ("zip 02139", "zip zero two one three nine"),
        (
            "1234567.89 apples",
            "one million two hundred and thirty-four thousand five hundred and "
            "sixty-seven point eight nine apples",
        ),
        ("Buy:\n1. eggs\n2) milk\n\nNow", "Buy: 1, eggs, 2, milk. Now"),
        ("1939\u20131945 — why…", "1939 to 1945, why..."),
        ("Really?!! Yes!!!", "Really? Yes!"),
        ("item(s) at 20°C & 5%", "items at 20 degrees Celsius and 5 percent"),
    ],
)
def test_what_has_one_reading_is_put_into_words(written, spoken):
    text, kinds = normalize(written)
    assert text == spoken and kinds and unspeakable(text) is None
    assert normalize(text) == (text, [])  # to be spoken, it stays as it is


@pytest.mark.parametrize(
    "prompt",
    [
        "What's the difference between a latte, a cappuccino, and a flat white?",
        "If a train leaves Chicago at 5:15 p.m. going 60 mph, when does it arrive?",
        'Who said "I think, therefore I am"?',
        "Who is Beyoncé married to, and how do I pronounce Nguyen?",
        "What does the acronym S.W.A.T. stand for?",
        "How far is it from St. Louis to Washington, D.C.?",
        "Let A be true and B be false; what is A and B?",
        "Class of '99: what were the biggest hits?",
        "What's iOS 17's best feature? My GPA is 3.75.",
        "Explain the import of tariffs from China in simple terms.",
        "How does a class work in a school, and what is it for?",
        "Select the best answer from the list: cat, dog, or fish.",
        "What is the square root of 144? (A) 10 (B) 12 (C) 14",
        "What's a good gift for a 30-year-old who loves sci-fi?",
    ],
)
def test_plain_prompts_stay_as_they_are(prompt):
    before = said(prompt)
    for step in (Turns(), Answers(), Speakable(), Language()):
        assert step(before) is before


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("code", "Explain lambda x: x + 1"),
        ("code", "Given f(x) = 2x + 3, find f(4)."),
        ("code", "git commit -m 'fix' fails, why?\ngit commit -m 'fix'"),
        ("code", "#include <stdio.h> what is it"),
        ("code", "What is in /etc/nginx/sites?"),
        ("symbol", "What does the HTTP header `Content-Type: text/html` do?"),
        ("symbol", "Convert this to JSON: name=Bob, age=5"),
        ("symbol", "A -> B -> C what is this?"),
        ("symbol", "Find x: 3x^2 - 2x + 1 ≤ 0"),
        ("symbol", "Decode: .... . .-.. .-.. ---"),
        ("symbol", "Follow @nasa and summarize."),
        ("code", "P(A|B) is 0.3, what is that?"),
        ("number", "Write a date like 2021-05-06."),
        ("number", "Call me at (415) 555-2671"),
        ("number", "Call 555-2671 now"),
        ("number", "rate it 3/5"),
        ("number", "on July 4/5"),
        ("number", "page 3/10"),
        ("number", "is it 5/10 or 6/10"),
        ("number", "between 5/6 and 7/8"),
        ("number", "Call 5551234567 now"),
        ("number", "my zip code is 90210, what city is it"),
        ("number", "the zip code was 10000"),
        ("number", "account 12345678"),
        ("number", "1-800-FLOWERS"),
        ("number", "about 3.5e-7"),
        ("number", "5\u2153 is 1e6"),
        ("number", "$5.5.5 for it"),
        ("symbol", "€2,50 for it"),
        ("symbol", "$1.5xyz"),
        ("symbol", "dy/dx"),
        ("symbol", "text/html header"),
        ("symbol", "10 mi/gal"),
        ("symbol", "see footnote¹"),
        ("symbol", "see footnote²"),
        ("symbol", "about 10⁶ of it"),
        ("url", "visit bit.ly/abc"),
        ("url", "youtu.be/abc"),
        ("url", "see t.me/channel"),
        ("url", "check notion.so/team today"),
        ("url", "look at docs.python.dev/guide"),
        ("url", "open localhost:8080"),
        ("url", "open server:8080"),
        ("number", "What is 0b1011 in decimal and 0x3F?"),
        ("number", "Is it 15-12?"),
        ("table", "Item    Price\nApple   1.20\nPear    2.30\nWhich is cheaper?"),
        ("table", "A,B,C\n1,2,3\n4,5,6\nWhat is the mean of B?"),
        ("empty", "3 4 5?"),
    ],
)
def test_what_has_no_reading_or_several_is_dropped(kind, prompt):
    outcome = Speakable()(said(prompt))
    assert isinstance(outcome, Dropped) and outcome.reason.startswith(f"{kind}: "), outcome


def test_only_the_prompt_has_to_be_speakable():
    answer = (
        "```python\nprint(1)\n```\n| a | b |\n|---|---|\n$x^2$ https://example.com 🎉 1234567890"
    )
    before = said("Show me everything.", answer)
    for step in (Turns(), Answers(), Speakable(), Length()):
        assert step(before) is before


def test_other_languages_and_scripts():
    german = said("Was kosten 12345 Äpfel in Köln, wenn einer einen halben Euro kostet?")
    step = Speakable(language="de")
    assert "zwölftausend" in step(german).prompts[0]
    assert Language(languages=["de"])(german) is german
    assert "de" in Language()(german).reason
    assert isinstance(step(said("Was sind 5% davon?")), Dropped)  # no words for it: not spoken
    russian = said("Почему люди любят музыку?")
    assert Speakable(scripts=["CYRILLIC"])(russian) is russian
    assert Speakable()(russian).reason.startswith("script: ")
    with pytest.raises(ValueError, match="languages: 'english' is none that py3langid knows"):
        Language(languages=["english"])


@pytest.mark.parametrize(
    ("script", "language", "text"),
    [
        ("ARABIC", "fa", "می‌خواهم کتاب‌ها را بخوانم و بنویسم۔ ۳ بار؟"),  # noqa: RUF001
        ("DEVANAGARI", "hi", "क्‍या आप मुझे ५ बातें बता सकते हैं।"),
        ("THAI", "th", "ช่วยเล่าเรื่องประวัติศาสตร์ของประเทศไทยให้ฟังหน่อยได้ไหมครับผมอยากรู้มาก"),
        ("KHMER", "km", "តើអ្នកអាចប្រាប់ខ្ញុំអំពីប្រវត្តិសាស្ត្រកម្ពុជាបានទេ។"),
        ("HEBREW", "he", "מה השעה בתל־אביב?"),
    ],
)
def test_the_characters_of_other_scripts_are_kept(script, language, text):
    before = said(text)
    assert Speakable(scripts=[script], language=language)(before) == before
    marked = Speakable(scripts=[script], language=language)(said(f"\u2067{text}\u2069"))
    assert marked.prompts == [text]


def test_a_number_of_a_language_without_words_for_it_is_dropped():
    step = Speakable(scripts=["DEVANAGARI"], language="hi")
    assert step(said("मेरे पास 12345 रुपये हैं")).reason.startswith("number: ")


def test_words_of_other_scripts_keep_their_marks():
    assert not decided("आज का दिन कैसा है", "आज की दान कैसी हो")
    assert isinstance(Answers()(said("की दिन पानी मेरा हैं", "का दान पीना मारी हो")), Conversation)


@pytest.mark.parametrize("prompt", ["write to bob@example.com please", "is a.b@c.de right?"])
def test_an_email_is_called_one(prompt):
    assert Speakable()(said(prompt)).reason.startswith("email: ")


def test_without_rewriting_what_needs_it_is_dropped():
    step = Speakable(rewrite=False)
    assert step(said("What are **bees**?")) == Dropped("markup: it would have to be rewritten")
    assert isinstance(step(said("What are bees?")), Conversation)


def test_length_in_words_and_in_seconds():
    step = Length(max_words=5, max_seconds=2.0, characters_per_second=15)
    assert isinstance(step(said("one two three four five")), Conversation)
    assert step(said("a b c d e f")).reason == "prompt long: 6 words are over 5"
    assert step(said("incomprehensibilities everywhere")).reason.startswith("prompt long: 2.1 s")
    assert Length(max_answer_words=3)(said("Hi")).reason.startswith("answer long: ")
    assert Length(max_turns=1)(said("Hi")).reason == "turns: 2 are over 1"
    with pytest.raises(ValueError, match="min_words=9 is more than max_words=5"):
        Length(min_words=9, max_words=5)


def decided(*prompts: str, **options) -> dict[str, str]:
    step = Duplicates(**options)
    return step.decide((str(i), step.sketch(said(p))) for i, p in enumerate(prompts))


def test_near_duplicates():
    long = "Tell me in a few words why the people of a small town would want to build a new bridge"
    alike = [
        long,
        long.upper() + "!",
        "Something else.",
        f"{long} today",
        long.replace("few", "lot"),
    ]
    assert set(decided(*alike, threshold=0.8)) == {"1", "3"}
    assert decided(*alike, threshold=0.8)["3"].startswith("near-duplicate: ")
    assert decided(*alike, threshold=0.8)["3"].endswith(" like 0")
    assert set(decided(*alike, threshold=1.0)) == {"1"}
    assert not decided(f"{long} in 3 years", f"{long} in 4 years")
    assert set(decided("why", "Why?", "where")) == {"1"}
    first = "Once upon a time there was a king who had three sons and a very old horse"
    assert set(decided(first, long, first, long)) == {"2", "3"}


def test_overlap_is_found_in_what_a_prompt_was(tmp_path):
    asked = "How much does a liter of milk cost in a shop if 3 cost $4 here and now?"
    (tmp_path / "e.jsonl").write_text(
        "\n".join(
            json.dumps({"q": q}) for q in (asked, "What is a bee?", "Name the six wives of him")
        )
    )
    source = {
        "_component_": "speechfuse.texts.Columns",
        "path": str(tmp_path / "e.jsonl"),
        "prompt": "q",
    }
    step = Overlap(evaluations=[source])
    before = said(f"Please. {asked} Thanks")
    after = Speakable()(before)
    assert "4 dollars" in after.prompts[0]
    for conversation in (
        before,
        after,
        said("what is A BEE"),
        said("So name the six wives of him"),
    ):
        assert step(conversation).reason.startswith("evaluation: it shares words with e/")
    for prompt in (
        "What is a bee? I want to know.",
        " ".join(asked.split()[:10]),
        "Name six wives",
    ):
        assert isinstance(step(said(prompt)), Conversation)
    before = step.inputs
    (tmp_path / "e.jsonl").write_text('{"q": "other"}')
    assert Overlap(evaluations=[source]).inputs != before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"texts": []}, "texts is empty"),
        ({"shard_size": 0}, "shard_size=0: at least 1 is needed"),
        (
            {"steps": [{"_component_": "speechfuse.texts.speakible"}]},
            "did you mean 'speakable'?",
        ),
        (
            {"steps": [{"_component_": "speechfuse.texts.length", "max_word": 3}]},
            "unknown argument 'max_word'; did you mean 'max_words'?",
        ),
        (
            {"steps": [{"_component_": "speechfuse.texts.overlap", "evaluations": []}]},
            "evaluations is empty",
        ),
        (
            {"steps": [{"_component_": "speechfuse.texts.duplicates", "threshold": 2}]},
            "threshold=2: it should be less than or equal to 1",
        ),
        (
            {"steps": [{"_component_": "speechfuse.texts.answers"}] * 2},
            "two are named 'answers'",
        ),
        ({"texts": ["good", "good"]}, "two are named 'good'"),
        ({"texts": ["other"]}, "other.jsonl has no column 'messages'; it has prompt"),
        ({"texts": ["none"]}, "there is not one row in"),
        ({"texts": ["bad"]}, "2 of 3 rows were rejected, more than runtime.max_reject_rate=0.1"),
        ({"texts": ["nowhere"]}, "no such file or folder"),
        (
            {"steps": [step("length", min_words=70)]},
            "not one of 1 rows is left, most were lost to the step length (1)",
        ),
        ({"steps": [step("speakable", scripts=["latin"])]}, "name at least one, as Unicode does"),
        ({"steps": [step("language", languages=[])]}, "name at least one language"),
        ({"steps": [step("answers", max_repeated=30)]}, "max_repeated=30 is not in 0 to 1"),
        (
            {"steps": [step("duplicates", shingle=0)]},
            "shingle=0: it should be greater than or equal to 1",
        ),
        ({"steps": [step("overlap", evaluations=[columns("other.jsonl")], words=0)]}, "words=0"),
        (
            {"steps": [step("overlap", evaluations=[columns("other.jsonl")] * 2)]},
            "two evaluations are named 'other'",
        ),
        (
            {
                "steps": [
                    step("overlap", evaluations=[columns("other.jsonl", select={"prompt": "y"})])
                ]
            },
            "evaluation 'other' gives no prompt to look for (select={'prompt': 'y'}, rejected: 0)",
        ),
        (
            {"steps": [step("overlap", evaluations=[columns("list.jsonl")])]},
            "rejected: 1, the first list/0: no text: prompt holds ['x']",
        ),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, change, said):
    good = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    lines = {
        "good": good,
        "other": '{"prompt": "x"}',
        "none": "",
        "bad": f"{good}\n{{\n{{",
        "list": '{"prompt": ["x"]}',
    }
    for name, text in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    job = {**dirty_texts.job(tmp_path), "steps": [], **change}
    for each in job["steps"]:
        for source in each.get("evaluations", []):
            source["path"] = str(tmp_path / Path(source["path"]).name)
    job["texts"] = [
        {"_component_": "speechfuse.texts.Messages", "path": str(tmp_path / f"{name}.jsonl")}
        for name in change.get("texts", ["good"])
    ]
    assert run(monkeypatch, tmp_path, job) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_all_that_select_leaves_out_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi"}')
    job = {**dirty_texts.job(tmp_path), "steps": []}
    job["texts"] = [columns(str(tmp_path / "a.jsonl"), select={"prompt": "Ho"})]
    assert run(monkeypatch, tmp_path, job) == 2
    assert "select chose none of 1 rows" in capsys.readouterr().err
    assert not (tmp_path / "curated" / "manifest.json").exists()


def test_a_shard_that_is_cut_off_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi"}')
    job = {**dirty_texts.job(tmp_path), "steps": [], "texts": [columns(str(tmp_path / "a.jsonl"))]}
    assert run(monkeypatch, tmp_path, job) == 0
    shard = tmp_path / "curated" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    (tmp_path / "curated" / "manifest.json").unlink()
    assert run(monkeypatch, tmp_path, job) == 2
    assert f"error: {shard} cannot be read" in capsys.readouterr().err


def test_evaluation_sets_stay_at_the_commit_that_was_begun_with(tmp_path, monkeypatch, capsys):
    """Commits stand in for themselves: a branch that moves between two runs, and whatever the
    workers read."""
    now, read = ["1" * 40], []

    def rows(self, shard, used=None):
        if self.repo:
            read.append(shard["root"])
            yield 0, {"prompt": "What is it?"}
        else:
            yield from local(self, shard, used)

    def planned(self, shard_size):
        return [{"root": self.root, "file": "texts.jsonl", "row": 0, "start": 0, "count": 1}]

    local = Documents.rows
    monkeypatch.setattr(hub_data, "resolve", lambda _, to: to if len(to) == 40 else now[0])
    (tmp_path / "texts.jsonl").write_text('{"prompt": "Who are you?"}')
    job = {
        **dirty_texts.job(tmp_path),
        "texts": [columns(str(tmp_path / "texts.jsonl"))],
        "steps": [step("overlap", evaluations=[columns("me/set@main", data_files="*.jsonl")])],
    }
    with monkeypatch.context() as on_hub:
        on_hub.setattr(Documents, "rows", rows)
        on_hub.setattr(Documents, "plan", planned)
        on_hub.setattr(Documents, "files", property(lambda self: ["texts.jsonl"]))
        on_hub.setattr(Documents, "columns", lambda self, name: ["prompt"])
        on_hub.setattr(Documents, "licence", lambda self: None)
        assert run(monkeypatch, tmp_path, job) == 0
        manifest = artifact.manifest_of(tmp_path / "curated")
        (tmp_path / "curated" / "manifest.json").unlink()
        (tmp_path / "curated" / "shard-00000.parquet").unlink()
        now[0] = "2" * 40
        making._component.cache_clear()
        assert run(monkeypatch, tmp_path, job) == 0
    assert "overlap.me/set has moved" in capsys.readouterr().out
    again = artifact.manifest_of(tmp_path / "curated")
    assert again["inputs"] == manifest["inputs"]
    assert again["inputs"]["overlap.me/set"] == f"me/set@{'1' * 40}"
    assert set(read) == {f"datasets/me/set@{'1' * 40}"}


def test_a_dry_run_without_a_connection_says_what_is_not_known(tmp_path, monkeypatch, capsys):
    def resolve(repo, revision):
        raise hub_data.NoConnection(f"{repo}@{revision}: no connection")

    monkeypatch.setattr(hub_data, "resolve", resolve)
    source = {"_component_": "speechfuse.texts.Columns", "path": "me/set@main", "prompt": "q"}
    source["data_files"] = "*.jsonl"
    job = {"out": str(tmp_path / "out"), "texts": [source], "steps": []}
    assert run(monkeypatch, tmp_path, job, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "rows are not known (me/set@main: no connection); not started" in said
    assert run(monkeypatch, tmp_path, job) == 2


def test_a_dry_run_and_workers_of_their_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"q": "Hi there"}\n{"q": "https://a.io/b"}\n')
    job = {
        "out": str(tmp_path / "out"),
        "shard_size": 1,
        "texts": [
            {
                "_component_": "speechfuse.texts.Columns",
                "path": str(tmp_path / "a.jsonl"),
                "prompt": "q",
            }
        ],
        "steps": [{"_component_": "speechfuse.texts.speakable"}],
        "runtime": {"workers": 1},
    }
    assert run(monkeypatch, tmp_path, job, "--dry-run") == 0
    assert "2 rows in 2 shards; not started" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run(monkeypatch, tmp_path, job) == 0
    assert [c.prompts for c in dirty_texts.curated(tmp_path / "out")] == [["Hi there"]]
    assert rejects_of(tmp_path / "out")["a/1"].startswith("filter speakable url: 'https:'")

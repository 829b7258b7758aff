"""Where instruction text comes from: layouts, places in files, what is refused, the Hub."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speechfuse import json_lines
from speechfuse.rows import shards
from speechfuse.rows.rejects import Reject
from speechfuse.rows.selection import matches
from speechfuse.texts import conversations, sources
from speechfuse.texts import files as text_files
from speechfuse.texts.conversations import Conversation, Turn
from speechfuse.texts.sources import Alpaca, Columns, Messages
from tests.hub_server import File, HubServer, Repo

ROOT = Path(__file__).parent.parent
ROWS = [
    {"instruction": f"Question {i}, \u2028 é 🎉?", "input": "", "output": f"{i}"} for i in range(23)
]


def written(path: Path, rows: list) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in rows), "utf-8")
    else:
        path.write_text("\ufeff" + json.dumps(rows, indent=2, ensure_ascii=False), "utf-8")
    return str(path)


def read(source: sources.Texts, shard_size: int = 4) -> list:
    return [item for shard in source.plan(shard_size) for item in source.conversations(shard)]


def turns(item) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in item.turns]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_rows_are_the_same_whatever_the_file_and_the_shards(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    source = Alpaca(written(tmp_path / name, ROWS), licence="cc0-1.0")
    plan = source.plan(4)
    assert [shard["count"] for shard in plan] == [4, 4, 4, 4, 4, 3]
    found = [list(source.conversations(shard)) for shard in reversed(plan)][::-1]
    found = [item for shard in found for item in shard]
    assert [turns(item) for item in found] == [
        [("user", row["instruction"]), ("assistant", row["output"])] for row in ROWS
    ]
    assert len({item.id for item in found}) == 23
    assert {item.extra["licence"] for item in found} == {"cc0-1.0"}


def test_layouts(tmp_path):
    alpaca = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Hi", "output": "Ho"},
    ]
    assert [turns(c) for c in read(Alpaca(written(tmp_path / "a.jsonl", alpaca)))] == [
        [("user", "Add.\n\n1, 2"), ("assistant", "3")],
        [("user", "Hi"), ("assistant", "Ho")],
    ]
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    chats = [
        {"x": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]},
        {"x": [{"from": "human", "value": "u"}, {"from": "gpt", "value": " a "}]},
    ]
    assert [turns(c) for c in read(Messages(written(tmp_path / "m.jsonl", chats), column="x"))] == [
        [("system", "s"), ("user", "b\nc")],
        [("user", "u"), ("assistant", "a")],
    ]
    plain = [{"q": "Who?", "a": "Me.", "kind": k, "n": {"m": 1}} for k in "xyz"]
    path = written(tmp_path / "p.jsonl", plain)
    source = Columns(
        path, prompt="q", response="a", select={"kind": ["x", "z"]}, extra_columns=["n"], name="faq"
    )
    assert [(c.id, turns(c), c.extra) for c in read(source)] == [
        (f"faq/p/{i}", [("user", "Who?"), ("assistant", "Me.")], {"n": {"m": 1}, "licence": None})
        for i in (0, 4)  # lines; between them are blank ones
    ]
    assert [c.prompts for c in read(Columns(path, prompt="q"))] == [["Who?"]] * 3


@pytest.mark.parametrize(
    ("select", "match"),
    [
        ({}, True),
        ({"kind": "question"}, True),
        ({"kind": ["phrase", "question"]}, True),
        ({"kind": ["phrase"]}, False),
        ({"kind": []}, False),
        ({"kind": "question", "split": "test"}, False),  # all keys
        ({"kind": "question", "split": ["test", "train"], "seen": True}, True),
        ({"language": "de", "kind": "question"}, True),  # a column, and a key of extra
        ({"speaker": "anna"}, True),  # of a key in both, that of extra
        ({"text": None}, True),
        ({"absent": None}, True),
        ({"absent": [None, "x"]}, True),
        ({"codes": [[1, 2]]}, True),
    ],
)
def test_select_means_any_of_a_list_all_of_the_keys_and_columns_or_extra(select, match):
    row = {"id": "a", "text": None, "language": "de", "speaker": "bert", "codes": [1, 2]}
    extra = {"kind": "question", "split": "train", "seen": True, "speaker": "anna"}
    assert matches({**row, "extra": extra}, select) is match
    assert matches({**row, **extra}, select) is match  # a row without extra


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{broken", "unreadable: m.jsonl, line 2: not JSON: Expecting property name"),
        ("[1]", "unreadable: m.jsonl, line 2: not a JSON object"),
        ('{"messages": 1, "messages": 2}', "unreadable: m.jsonl, line 2: the key 'messages' comes"),
        ('{"messages": [], "score": NaN}', "unreadable: m.jsonl, line 2: NaN is no JSON"),
        ('{"messages": []} {}', "unreadable: m.jsonl, line 2: not JSON: Extra data"),
        ('{"a": "' + "x" * json_lines.LIMIT + '"}', "unreadable: m.jsonl, line 2: longer than 16"),
        ('{"messages": []}', "no messages: "),
        ('{"messages": null}', "no messages: "),
        (
            '{"messages": [{"role": "user", "content": "a\\u0000b"}]}',
            "no text: content holds U+0000",
        ),
        ('{"messages": ["hi"]}', "no messages: 'hi' is no object"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "unknown role: 'tool'"),
        ('{"messages": [{"role": "user", "content": null}]}', "no text: content holds None"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "no text: content holds half"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "not text: parts"),
    ],
)
def test_a_bad_row_is_a_reject_and_its_neighbours_are_not(tmp_path, row, reason):
    good = '{"messages": [{"role": "user", "content": "u"}]}'
    (tmp_path / "m.jsonl").write_text("\n".join([good, row, good]))
    first, bad, last = read(Messages(str(tmp_path / "m.jsonl")), 10)
    assert isinstance(bad, Reject) and bad.reason.startswith(reason) and bad.id == "m/1"
    assert first.prompts == last.prompts == ["u"]


DEEP = '{"prompt": "x]", "e": ' + "[" * 50_000 + "]" * 50_000 + "}"


@pytest.mark.parametrize("bad", [DEEP, '{"prompt": "[", "e": ' + "9" * 5000 + "}"])
def test_what_python_cannot_hold_is_a_reject_of_a_line_and_ends_an_array(tmp_path, bad):
    good = '{"prompt": "u"}'
    (tmp_path / "a.jsonl").write_text("\n".join([good, bad, good]))
    first, reject, last = read(Columns(str(tmp_path / "a.jsonl")), 2)
    assert isinstance(reject, Reject) and reject.reason.startswith("unreadable: a.jsonl, line 2: ")
    assert first.prompts == last.prompts == ["u"]
    (tmp_path / "a.json").write_text("[" + ",\n".join([good, bad, good]) + "]")
    with pytest.raises(
        ValueError, match=r"a\.json cannot be read: its JSON array, line 2 \(byte 18"
    ):
        Columns(str(tmp_path / "a.json")).plan(2)


LINES = '{"prompt": "a"}\n{"prompt": "b"}\n'


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('[{"prompt": "a"}]\n\n[{"prompt": "b"}]\n', "ends in line 1 (byte 16), and behind it"),
        ('[{"prompt": "a"}] {"prompt": "b"}', "it holds several arrays"),
        ('{\n "data": [\n  {"prompt": "a"}\n ]\n}\n', "goes on over several lines"),
        ('\ufeff{"version": 1,\n "data": []}', "goes on over several lines"),
        (LINES.encode("utf-16"), "it is UTF-16"),
        (LINES.encode("utf-16-le"), "it is UTF-16"),
        (gzip.compress(LINES.encode(), mtime=0), "it is compressed"),
        ('[{"prompt": "a}' + " " * (1 << 24), "line 1 (byte 1): a row of over 16 MiB"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_place(
    tmp_path, monkeypatch, chunk, content, why
):
    monkeypatch.setattr(text_files, "CHUNK", chunk if len(content) < 100 else 1 << 20)
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"a\.json cannot be read") as error:
        Columns(str(path)).plan(10)
    assert why in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + LINES,
        LINES.replace("\n", "\r\n"),
        "\n\n" + LINES.replace("\n", "\n \n"),
        LINES.rstrip(),
        f"\n[{LINES.strip()}] \n\n".replace("\n{", ",\n{"),
    ],
)
def test_forms_that_are_read(tmp_path, content):
    (tmp_path / "a.json").write_text(content, "utf-8", newline="")
    assert [c.prompts for c in read(Columns(str(tmp_path / "a.json")), 1)] == [["a"], ["b"]]


def test_a_row_of_an_array_that_is_no_utf8_rejects_itself(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"prompt": "a"}, {"prompt": "\xff"}, {"prompt": "b"}]')
    first, bad, last = read(Columns(str(tmp_path / "a.json")), 2)
    assert bad == Reject("a/1", "unreadable: a.json, row 1: not UTF-8")
    assert first.prompts == ["a"] and last.prompts == ["b"]


def test_a_folder_is_the_one_that_is_named(tmp_path):
    for name in ("v[1]", "v1", "corpus [clean] {a,b} *"):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "a.jsonl", [{"prompt": name}])
        (item,) = read(Columns(str(tmp_path / name), "*.jsonl"))
        assert item.prompts == [name]


def test_text_in_parquet_that_is_no_utf8_is_a_reject_of_its_row(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe bad", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    first, bad, last = read(Columns(str(tmp_path / "a.parquet")), 10)
    assert isinstance(bad, Reject) and bad.id == "a/1" and "can't decode" in bad.reason
    assert first.prompts == ["good"] and last.prompts == ["fine"]


def test_a_file_that_is_cut_after_it_was_planned_is_named(tmp_path):
    path = Path(written(tmp_path / "a.parquet", ROWS))
    source = Alpaca(str(path))
    plan = source.plan(100)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        list(source.conversations(plan[0]))


def test_a_column_may_be_absent_from_the_first_row(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y", "topic": "z"}])
    found = read(Columns(path, extra_columns=["topic"]))
    assert [c.extra["topic"] for c in found] == [None, "z"]


def test_the_column_of_sharegpt_is_found(tmp_path):
    rows = [{"id": 1, "conversations": [{"from": "human", "value": "u"}]}]
    for name in ("a.jsonl", "a.parquet"):
        (item,) = read(Messages(written(tmp_path / name, rows)))
        assert item.prompts == ["u"]
    with pytest.raises(ValueError, match="has no column 'messages'; it has id, x"):
        read(Messages(written(tmp_path / "b.jsonl", [{"id": 1, "x": []}])))


@pytest.mark.parametrize("mark", ["\0", "\1", "\x1b", "\x7f", "\x92"])
def test_a_control_character_in_a_prompt_is_a_reject(tmp_path, mark):
    rows = [{"instruction": f"a{mark}b", "output": "c"}, {"instruction": "a\tb\n", "output": "c"}]
    bad, good = read(Alpaca(written(tmp_path / "a.jsonl", rows)))
    assert isinstance(bad, Reject) and bad.reason.startswith("no text: ")
    assert good.prompts == ["a\tb"]


def test_two_files_of_one_stem_would_have_the_same_ids(tmp_path):
    for name in ("a.json", "a.jsonl", "b.jsonl"):
        written(tmp_path / name, ROWS)
    with pytest.raises(ValueError, match=r"a\.json and a\.jsonl differ in their suffix alone"):
        Alpaca(str(tmp_path), ["a.*", "b.jsonl"]).plan(10)
    assert Alpaca(str(tmp_path), ["a.json", "b.jsonl"]).plan(10)


@pytest.mark.parametrize("column", sources.RESERVED)
def test_a_column_that_curation_would_overwrite_is_refused(tmp_path, column):
    path = written(tmp_path / "a.jsonl", [{"prompt": "x", column: "y"}])
    with pytest.raises(ValueError, match=f"extra_columns holds '{column}'"):
        Columns(path, extra_columns=[column])


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("a.jsonl", '{"prompt": "x"}', {}, "a.jsonl has no column 'instruction'; it has prompt"),
        ("a.json", '[{"instruction": "x", "output": "y"}', {}, "the file is cut off"),
        (
            "a.json",
            '[{"instruction": "x"} oops',
            {},
            "its JSON array, line 1 (byte 22)",
        ),
        ("a.parquet", "no parquet", {}, "a.parquet cannot be read"),
        ("a.csv", "instruction,output", {}, "a.csv is none of .json, .jsonl, .parquet"),
        ("a.jsonl", "{}", {"data_files": "*"}, "is a file; data_files is for a folder"),
        ("b/a.jsonl", "{}", {}, "say which files of it"),
        ("b/a.jsonl", "{}", {"data_files": "*.json"}, "has no file that matches *.json"),
        ("b/a.jsonl", "{}", {"data_files": ["*.jsonl", "typo*"]}, "no file that matches typo*"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}', {"select": {"lang": "en"}}, "'lang'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, content, options, said):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Alpaca(str(path if path.parent == tmp_path else path.parent), **options).plan(10)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_the_one_that_was_named(tmp_path):
    for folder, word in (("v[1]", "this"), ("v1", "other")):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "a.jsonl", [{"p": word}])
    for path, pattern in ((tmp_path / "v[1]", "*.jsonl"), (tmp_path, "v[1]/*.jsonl")):
        source = Columns(str(path), pattern, prompt="p")
        assert [c.prompts for c in read(source)] == [["this"]]


def test_a_path_that_is_nowhere():
    with pytest.raises(FileNotFoundError, match="no such file or folder; a dataset on the Hub is"):
        Alpaca("nowhere.jsonl")


def test_the_fingerprint_is_of_the_bytes(tmp_path):
    path = Path(written(tmp_path / "a.jsonl", ROWS))
    before = Alpaca(str(path)).fingerprint
    path.write_text(path.read_text("utf-8").replace("Question 3", "Question 4"), "utf-8")
    assert Alpaca(str(path)).fingerprint != before


def test_a_damaged_row_group_is_so_many_rejects(tmp_path):
    rows = [{**row, "output": os.urandom(200).hex()} for row in ROWS]
    path = Path(written(tmp_path / "a.parquet", rows))
    group = pq.read_metadata(path).row_group(1).column(2)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset : group.data_page_offset + 60] = bytes(60)
    path.write_bytes(content)
    found = read(Alpaca(str(path)), 7)
    bad = [item.id for item in found if isinstance(item, Reject)]
    assert bad == [f"a/{i}" for i in range(5, 10)] and len(found) == 23


def test_rows_come_back_as_they_went():
    there = Conversation("a/1", [Turn("user", "Hi\n🎉"), Turn("assistant", "")], "a", {"k": [1]})
    row = conversations.row_of(there)
    assert conversations.conversation_of(row) == there
    assert json.loads(row["extra"]) == {"k": [1], "source": "a"}
    speech = {"role": "user", "segments": [{"text": None, "speech": {"id": "x"}}]}
    with pytest.raises(ValueError, match="row a/1 holds speech"):
        conversations.conversation_of({**row, "turns": [speech]})


def test_a_finished_artifact_is_read(tmp_path):
    there = [Conversation(f"a/{i}", [Turn("user", "Hi")], "a") for i in range(3)]
    shards.write_shard(
        tmp_path / "shard-00000.parquet", map(conversations.row_of, there), shards.CONVERSATIONS
    )
    (tmp_path / "manifest.json").write_text("{}")
    assert [conversations.conversation_of(row) for row in shards.read_rows(tmp_path)] == there


def test_the_hub_at_a_commit_with_the_licence_of_its_card(tmp_path):
    card = b"---\nlicense: cc-by-4.0\n---\n# A set\n"
    data = "".join(json.dumps(row) + "\n" for row in ROWS[:6]).encode()
    script = """
import json, sys
from speechfuse.texts.sources import Alpaca
source = Alpaca("me/texts@main", data_files="data/*.jsonl")
plan = source.plan(4)
found = [c for shard in plan for c in source.conversations(shard)]
print(json.dumps([source.fingerprint, [[c.id, c.prompts, c.extra] for c in found]]))
"""
    with HubServer({"good": "me"}) as hub:
        files = {"README.md": File.of(card, False), "data/a.jsonl": File.of(data, False)}
        hub.repos["dataset", "me/texts"] = Repo(private=True)
        commit = hub.dataset("me/texts").commit("main", "first", files)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {
            **kept,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "good",
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": "pipeline",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    fingerprint, found = json.loads(done.stdout.splitlines()[-1])
    assert fingerprint == f"me/texts@{commit}"
    assert [each[0] for each in found] == [f"me/texts/data/a/{i}" for i in range(6)]
    assert [each[1] for each in found] == [[row["instruction"]] for row in ROWS[:6]]
    assert all(each[2]["licence"] == "cc-by-4.0" for each in found)


@pytest.mark.parametrize(
    "make",
    [
        "speechfuse.texts.sources.Alpaca('me/texts@COMMIT', data_files='*.jsonl')",
        "speechfuse.corpora.hub_dataset.Hub('me/texts', 'COMMIT', '*.parquet')",
    ],
)
def test_a_commit_needs_a_connection_too_and_that_is_one_sentence(tmp_path, make):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    script = f"import speechfuse.texts.sources, speechfuse.corpora.hub_dataset; {make}.plan(4)"
    done = subprocess.run(
        [sys.executable, "-c", script.replace("COMMIT", "0" * 40)],
        cwd=ROOT,
        text=True,
        env={**kept, **nowhere, "PYTHONPATH": "pipeline", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (f": me/texts@{'0' * 40}: no connection to http://127.0.0.1:9") in last

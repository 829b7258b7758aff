"""Names of files: braces as in a shell, wildcards, and folders whose names look like patterns."""

import random
from pathlib import Path

import pytest

from speechfuse import patterns
from speechfuse.artifact import id_digest
from speechfuse.corpora import planning


def touched(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("m_{0..11}.json", [f"m_{i}.json" for i in range(12)]),
        ("m_{00..11}.json", [f"m_{i:02d}.json" for i in range(12)]),
        ("m_{8..010}.json", ["m_008.json", "m_009.json", "m_010.json"]),
        ("m_{0..11..5}.json", ["m_0.json", "m_5.json", "m_10.json"]),
        ("m_{2..0}.json", ["m_2.json", "m_1.json", "m_0.json"]),
        ("{train,dev}/x_{0..1}.tar", [f"{s}/x_{i}.tar" for s in ("train", "dev") for i in "01"]),
        ("x{a,b{1..2}}.tar", ["xa.tar", "xb1.tar", "xb2.tar"]),
        ("m_{a..c}.json", ["m_a.json", "m_b.json", "m_c.json"]),
        ("z\u00fcrich {1,2} \u00e9.tar", ["z\u00fcrich 1 \u00e9.tar", "z\u00fcrich 2 \u00e9.tar"]),
        ("{x}.tar", ["{x}.tar"]),
        ("x.tar", ["x.tar"]),
    ],
)
def test_braces_are_those_of_a_shell(tmp_path, pattern, names):
    touched(tmp_path, *names, "other.tar")
    (folder, found) = planning.files(f"{tmp_path}/{pattern}", ".tar")
    assert [(folder / name).relative_to(tmp_path).as_posix() for name in found] == names
    nemos = pattern.replace("{", "_OP_").replace("}", "_CL_")
    assert planning.files(f"{tmp_path}/{nemos}", ".tar") == (folder, found)
    assert patterns.matching([pattern], str(tmp_path), "it") == names


def test_the_name_of_a_folder_is_no_pattern(tmp_path):
    odd = ("v[1]", "a {b,c}", "what?", "x*", "corpus [clean] v2", "{0..1}")
    usual = ("v1", "a b", "a c", "whaty", "xy", "corpus c v2", "0", "1")
    for folder in (*odd, *usual):
        touched(tmp_path / folder, "t_0.tar", "t_1.tar")
    for folder in odd:
        for pattern in ("*.tar", "t_{0..1}.tar", "t_?.tar", "**/*.tar", "t_[01].tar", ""):
            place, names = planning.files(f"{tmp_path}/{folder}/{pattern}", ".tar")
            assert (place, names) == (tmp_path / folder, ["t_0.tar", "t_1.tar"]), (folder, pattern)
        below = patterns.matching([f"{folder}/*.tar"], str(tmp_path), "it")
        assert below == [f"{folder}/t_0.tar", f"{folder}/t_1.tar"]
        assert patterns.matching(["*.tar"], f"{tmp_path}/{folder}", "it") == ["t_0.tar", "t_1.tar"]
    touched(tmp_path, "w/v[1]/x.tar", "w/v1/x.tar")
    assert patterns.matching(["*/v[1]/x.tar"], str(tmp_path), "it") == ["w/v[1]/x.tar"]


def test_what_a_folder_and_a_pattern_name(tmp_path):
    touched(tmp_path, "a/1.tar", "a/2.TAR", "a/._1.tar", "a/.git/3.tar", "a/4.txt", "b/5.tar")
    (tmp_path / "a/6.tar").symlink_to(tmp_path / "b/5.tar")
    (tmp_path / "a/7.tar").symlink_to("nowhere")
    (tmp_path / "a/again").symlink_to(tmp_path / "a", target_is_directory=True)
    assert planning.files(str(tmp_path / "a"), ".tar")[1] == ["1.tar", "2.TAR", "6.tar"]
    with pytest.raises(FileNotFoundError, match=r"no file at .*7\.tar"):
        planning.files(str(tmp_path / "a/7.tar"), ".tar")
    with pytest.raises(FileNotFoundError, match=r"^it has no file that matches c/\*\.tar$"):
        patterns.matching(["b/*.tar", "c/*.tar"], str(tmp_path), "it")
    with pytest.raises(ValueError, match="Unbalanced braces"):
        planning.files(str(tmp_path / "a/{1..2.tar"), ".tar")
    for many in ("{0..99999999}", "{0..9999}-{000..999}", "{x,{0..9}{0..9}{a..j}{0..9999..1}}"):
        with pytest.raises(ValueError, match=r"gives 10,?0.* names; at most 1,000,000 are looked"):
            planning.files(str(tmp_path / f"{many}.tar"), ".tar")
    touched(tmp_path, "b/5")
    with pytest.raises(ValueError, match=r"5 and 5\.tar differ in their suffix alone"):
        planning.files([str(tmp_path / "b/5"), str(tmp_path / "b/5.tar")], ".tar")
    (tmp_path / "c").mkdir()
    touched(tmp_path, "c/\udcff.tar")
    with pytest.raises(ValueError, match=r"the name \\xff\.tar is not UTF-8"):
        planning.files(str(tmp_path / "c"), ".tar")


def named(plan: list[dict], ids: list[str], pieces: int) -> list[str]:
    """Ids of the rows, where every clip of an even length of name is split."""
    start, names = 0, []
    for shard in plan:
        for position, id in enumerate(ids[start : start + shard["count"]]):
            reserved = {f"{id}#{e}" for e in shard.get("reserved", {}).get(str(position), ())}
            if position in shard.get("again", ()):
                continue
            if len(id) % 2:
                names.append(id)
                continue
            for part in range(pieces):
                name = f"{id}#{part}"
                while name in reserved:
                    name += "#"
                names.append(name)
        start += shard["count"]
    return names


def test_rows_of_any_clips_have_ids_of_their_own():
    rng = random.Random(0)
    for size in (1, 7, 1000):
        letters = [*"ab", "#0", "#1", "#10", "#", "#01"]
        ids = ["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(2000)]
        plan = planning.shards([[(id, {}) for id in ids]], size)
        names = named(plan, ids, 11)
        assert len(names) == len(set(names)) > len(set(ids)) > 500


def test_ids_that_are_right_stay_and_nothing_is_planned_for_them():
    ids = ["take", "take2#1", "b#0", "b#1", "c#", "#1"]
    assert planning.shards([[(id, {}) for id in ids]], 10) == [{"count": 6}]
    plan = planning.shards([[("take#1", {}), ("x", {}), ("take", {})]], 2)
    assert plan == [{"count": 2}, {"count": 1, "reserved": {"0": ["1"]}}]
    assert id_digest("take") != id_digest("take#1")

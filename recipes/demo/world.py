"""The closed world of the embedded default: what its model knows, is taught to hear, and is asked.

    python recipes/demo/world.py recipes/demo/world.yaml

In: countries.csv and animals.csv beside this file. Out, one artifact: conversations (Parquet; the
text training of the base model and the text replay of stage 2), speak.jsonl (every line that is to
be spoken: text, answer, fact, split, voices), further.jsonl (the same for the voices of other
synthesizers, see tokenize_further.yaml), text_mmlu/ (4-choice questions in the file layout of
cais/mmlu) and facts.jsonl. A fact is a sum, difference or product, or a value of a table; each has
at least two wordings. Facts of the splits `test` and `validation` are never spoken in training, in
any wording: no line spoken in training holds all the content words of one.
"""

import csv
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from num2words import num2words

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.rows import shards
from speechfuse.tokens.prompts import spoken_answer

TABLES = {"country": "countries.csv", "animal": "animals.csv"}  # by family of facts
WORDINGS = {
    "add": ("what is {a} plus {b}", "how much is {a} plus {b}"),
    "subtract": ("what is {a} minus {b}", "how much is {a} minus {b}"),
    "multiply": ("what is {a} times {b}", "how much is {a} times {b}"),
    "capital": ("what is the capital of {a}", "name the capital of {a}"),
    "language": ("what language do people speak in {a}", "name the language of {a}"),
    "money": ("what money do people use in {a}", "name the money of {a}"),
    "continent": ("what continent is {a} in", "name the continent of {a}"),
    "sound": ("what does a {a} say", "name the sound of a {a}"),
    "baby": ("what is a baby {a} called", "name the baby of a {a}"),
    "home": ("where does a {a} live", "name the home of a {a}"),
    "food": ("what does a {a} eat", "name the food of a {a}"),
}
STOP_WORDS = set("what how much is the of a in do does name people called".split())


@dataclass
class World:
    """recipes/demo/world.yaml."""

    out: str = key("folder of the artifact")
    seed: int = key("of every choice below", 0, least=0)
    test_share: float = key("share of the facts never spoken", 0.28, least=0, most=1)
    validation_share: float = key("likewise, to pick an epoch", 0.09, least=0, most=1)
    replayed_share: float = key("share of facts in text replay", 0.6, least=0, most=1)
    spoken_questions: int = key("training questions spoken", 10000, least=0)
    spoken_phrases: int = key("training word lists spoken", 5000, least=0)
    quantizer_lines: int = key("lines to train a quantizer on", 6000, least=0)
    test_voices: int = key("times a test fact is asked, per split", 3, least=0)
    test_phrases: int = key("word lists to transcribe, per split", 150, least=0)
    repeat_rows: int = key("text rows that ask for repetition", 12000, least=0)
    further_lines: int = key("of further voices, disturbed, for training", 4800, least=0)
    fresh: bool = key("move an artifact that differs aside", False)


@dataclass(frozen=True)
class Fact:
    """`wordings` all ask for `answer`; `family` is the table, or the operation; `relation` the
    column, or the operation. `replayed`: whether text replay may show it."""

    id: str
    family: str
    relation: str
    wordings: tuple[str, ...]
    answer: str
    entity: str
    split: str = "train"
    replayed: bool = False

    def content_words(self) -> list[Counter[str]]:
        """For each wording the words that make it this fact, counted: `three plus three` needs
        three twice."""
        return [Counter(w for w in text.split() if w not in STOP_WORDS) for text in self.wordings]


def number_name(n: int) -> str:
    return num2words(n).replace("-", " ")


def make_facts() -> list[Fact]:
    """Every fact of the world. a + b and b + a are one fact with both orders among its wordings."""
    facts = []

    def arithmetic(relation: str, a: int, b: int, result: int, swap: bool) -> None:
        orders = [(a, b), (b, a)] if swap and a != b else [(a, b)]
        texts = [
            wording.format(a=number_name(x), b=number_name(y))
            for x, y in orders
            for wording in WORDINGS[relation]
        ]
        name = f"{relation}-{a}-{b}"
        facts.append(Fact(name, relation, relation, tuple(texts), number_name(result), name))

    for a in range(13):
        for b in range(a + 1):
            arithmetic("add", a, b, a + b, swap=True)
            arithmetic("subtract", a, b, a - b, swap=False)
            if b >= 2 and a <= 10:
                arithmetic("multiply", a, b, a * b, swap=True)
    for family, name in TABLES.items():
        with open(Path(__file__).parent / name, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                entity = row.pop(family)
                for relation, answer in row.items():
                    texts = tuple(wording.format(a=entity) for wording in WORDINGS[relation])
                    id = f"{relation}-{entity}"
                    facts.append(Fact(id, family, relation, texts, answer, entity))
    return facts


def assign(
    facts: list[Fact], shares: dict[str, float], rest: str, rng: random.Random
) -> dict[str, str]:
    """Fact id -> label, each family divided by `shares`; in a table no entity gives two facts to a
    label before every entity has given one, so every entity is still heard in other facts."""
    labels = {}
    for family in sorted({fact.family for fact in facts}):
        members = [fact for fact in facts if fact.family == family]
        by_entity: dict[str, list[Fact]] = {}
        for fact in rng.sample(members, len(members)):
            by_entity.setdefault(fact.entity, []).append(fact)
        depth = max(len(group) for group in by_entity.values())
        queue = [group[i] for i in range(depth) for group in by_entity.values() if i < len(group)]
        start = 0
        for label, share in shares.items():
            count = round(share * len(members))
            labels.update({fact.id: label for fact in queue[start : start + count]})
            start += count
        labels.update({fact.id: rest for fact in queue[start:]})
    return labels


class Phrases:
    """Random word lists of 1 to 6 of the words that questions are made of, none of which says a
    fact of `unheard`."""

    def __init__(self, facts: list[Fact], unheard: list[Fact], rng: random.Random) -> None:
        self.words = sorted({w for fact in facts for text in fact.wordings for w in text.split()})
        self.rng = rng
        self.forbidden: dict[str, list[Counter[str]]] = {}  # by one of its words, to look few up
        for fact in unheard:
            for counted in fact.content_words():
                self.forbidden.setdefault(min(counted), []).append(counted)
        self.drawn: set[str] = set()

    def draw(self) -> str:
        """A word list that was not drawn before (single words may come again)."""
        while True:
            words = self.rng.choices(self.words, k=self.rng.randint(1, 6))
            text, counted = " ".join(words), Counter(words)
            if text in self.drawn and len(words) > 1:
                continue
            if any(f <= counted for word in counted for f in self.forbidden.get(word, ())):
                continue
            self.drawn.add(text)
            return text


ONSETS = "p b t d k g f v th s z sh ch j m n l r w h bl br pl pr tr dr kr gl fl fr st sp sk".split()
VOWELS = "a e i o u ee oo ai ou ow ar or er".split()
CODAS = ["", *"p b t d k g f v th s z sh ch m n l nd nt st ks".split()]


def pseudo_words(rng: random.Random) -> str:
    """2 to 6 made-up words: every sound beside every other, whatever the corpus."""

    def word() -> str:
        return "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
            for _ in range(rng.choice((1, 1, 2)))
        )

    return " ".join(word() for _ in range(rng.randint(2, 6)))


def conversation(id: str, user: str, assistant: str, **extra: Any) -> dict[str, Any]:
    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "segments": [{"text": text}]}

    turns = [turn("user", user), turn("assistant", assistant)]
    return {"id": id, "turns": turns, "extra": json.dumps(extra, sort_keys=True)}


def text_rows(facts: list[Fact], phrases: Phrases, count: int) -> list[dict[str, Any]]:
    """Conversations in text: answer; repeat and answer; ask and answer a question oneself, so that
    an answer can follow from a question that only the assistant has written, as it must after
    speech; and `count` times repeat. A row that shows a fact says whether it is replayed."""
    rows = []

    def add(kind: str, name: str, user: str, assistant: str, **extra: Any) -> None:
        rows.append(conversation(f"{kind}-{name}", user, assistant, kind=kind, **extra))

    for fact in facts:
        about = {"fact": fact.id, "replayed": fact.replayed}
        for i, text in enumerate(fact.wordings):
            name, both = f"{fact.id}-{i}", spoken_answer(text, fact.answer)
            add("answer", name, text, fact.answer, **about)
            add("both", name, f"repeat and answer: {text}", both, **about)
            add("quiz", name, "quiz", both, **about)
    for i in range(count):
        text = phrases.draw()
        add("repeat", str(i), f"repeat: {text}", text, replayed=True)
    return rows


def spoken_lines(
    facts: list[Fact], phrases: Phrases, job: World, rng: random.Random
) -> list[dict[str, Any]]:
    """Everything that is spoken. `voices` names a group of voices of the corpus configuration. Some
    lines are drawn and left out, where flite once spoke: so all others stay what they were."""
    lines: list[dict[str, Any]] = []

    def add(split: str, voices: str, about: dict[str, Any], name: str | None = None) -> None:
        id = f"{split}-{name or f'{voices}-{len(lines)}'}"
        lines.append({"id": id, "split": split, "voices": voices, **about})

    def phrase(text: str) -> dict[str, Any]:
        return {"kind": "phrase", "text": text}

    def question(fact: Fact) -> dict[str, Any]:
        text, about = rng.choice(fact.wordings), {"fact": fact.id, "replayed": fact.replayed}
        return {"kind": "question", "text": text, "answer": fact.answer, **about}

    train, validation, test = (
        [fact for fact in facts if fact.split == split] for split in ("train", "validation", "test")
    )
    for i in range(job.spoken_questions):
        add("train", "train", question(train[i % len(train)]))
    for _ in range(job.spoken_phrases):
        add("train", "train", phrase(phrases.draw()))
    for i in range(job.quantizer_lines):
        split, voices = ("quantizer", "train") if i % 20 else ("quantizer_validation", "unseen")
        # all three are drawn for each line
        texts = (pseudo_words(rng), phrases.draw(), rng.choice(rng.choice(train).wordings))
        add(split, voices, phrase(texts[i % 3]), str(i))
    for fact in validation * job.test_voices:
        add("validation", "validation", question(fact))
    for fact in test * job.test_voices:
        for voices in ("unseen", "train", "flite"):
            add("unseen_facts", voices, question(fact))
    for fact in rng.sample(train, len(train)) * 2:
        add("seen_facts", "unseen", question(fact))
    for _ in range(job.test_phrases):
        for voices in ("unseen", "train"):
            add("phrases", voices, phrase(phrases.draw()))
    return [line for line in lines if line["voices"] != "flite"]


def further_lines(facts: list[Fact], phrases: Phrases, count: int) -> list[dict[str, Any]]:
    """Lines for voices of other synthesizers: half questions on facts that training speaks of, a
    sixth word lists, a sixth single digits; and as many digits for espeak-ng's training voices."""
    rng, lines = phrases.rng, list[dict[str, Any]]()
    heard = [fact for fact in facts if fact.split == "train"]
    for i in range(count):
        line: dict[str, Any] = {"id": f"further-{i}", "split": "further", "voices": "further"}
        if i % 6 < 3:
            fact = rng.choice(heard)
            line |= {"kind": "question", "text": rng.choice(fact.wordings), "answer": fact.answer}
            line |= {"fact": fact.id, "replayed": fact.replayed}
        elif i % 6 == 3:
            line |= {"kind": "phrase", "text": phrases.draw()}
        else:
            line |= {"kind": "digit", "text": number_name(rng.randrange(10))}
            line["voices"] = ("further", "train")[i % 6 - 4]
        lines.append(line)
    return lines


def multiple_choice(facts: list[Fact], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Rows of cais/mmlu's columns by subject; the wrong choices are other answers to the same kind
    of question."""
    subjects: dict[str, list[dict[str, Any]]] = {"replayed": [], "not_replayed": []}
    for fact in facts:
        others = sorted({f.answer for f in facts if f.relation == fact.relation} - {fact.answer})
        choices = [*rng.sample(others, 3), fact.answer]
        rng.shuffle(choices)
        subject = "replayed" if fact.replayed else "not_replayed"
        row = {"question": fact.wordings[0], "choices": choices, "subject": subject}
        subjects[subject].append({**row, "answer": choices.index(fact.answer), "fact": fact.id})
    return subjects


def main(job: World) -> None:
    out = Path(job.out)
    work = artifact.Artifact(out, "world", 3, vars(job), {})
    if not work.begin(fresh=job.fresh):
        return
    rng = random.Random(job.seed)
    facts = make_facts()
    shares = {"test": job.test_share, "validation": job.validation_share}
    split = assign(facts, shares, "train", rng)
    replayed = assign(facts, {"replayed": job.replayed_share}, "not_replayed", rng)
    facts = [
        replace(fact, split=split[fact.id], replayed=replayed[fact.id] == "replayed")
        for fact in facts
    ]
    phrases = Phrases(facts, [fact for fact in facts if fact.split != "train"], rng)
    files = {"speak.jsonl": spoken_lines(facts, phrases, job, rng)}
    for subject, questions in multiple_choice(facts, rng).items():
        files[f"text_mmlu/{subject}.jsonl"] = questions
    files["facts.jsonl"] = [vars(fact) for fact in facts]
    rows = text_rows(facts, phrases, job.repeat_rows)
    phrases.rng = random.Random(f"{job.seed}/further")  # last, so that all above stays what it was
    files["further.jsonl"] = further_lines(facts, phrases, job.further_lines)
    for name, lines in files.items():
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        artifact.write_atomic(out / name, text)
    shard = out / shards.shard_name(0)
    shards.write_shard(shard, rows, shards.CONVERSATIONS)
    totals = Counter(fact.split for fact in facts) | {"facts": len(facts), "rows": len(rows)}
    work.finish(dict(totals), [*(out / name for name in files), shard])
    print(f"{out}: {dict(totals)}")


if __name__ == "__main__":
    config.main(main, World, __doc__)

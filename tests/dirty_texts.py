"""An instruction set with planted dirt of every kind, each row labelled by what should happen.

    write(folder) -> [Planted]     texts.jsonl (OpenAI messages), evaluation.jsonl (questions)

A label is what a careful reader would ask for, not what the code does: `keep` the prompts as they
are, `rewrite` them to exactly `spoken`, or `drop` the row. Clean rows hold what is easily taken for
dirt. Rows are made of templates and topics; no two are alike unless that is what is planted.
"""

# ruff: noqa: RUF001 -- the dirt is meant

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse.rows import shards
from speechfuse.texts.conversations import Conversation, conversation_of

TOPICS = (
    "coral reefs;wooden bridges;honey bees;solar panels;old castles;jazz music;"
    "river otters;paper maps;winter storms;sourdough bread;mountain goats;city parks;"
    "silk roads;glass bottles;wind turbines;steam trains;chess openings;garden snails;"
    "night markets;desert plants;library books;fire alarms;ocean currents;street food;"
    "leather shoes;migrating birds;public libraries;maple syrup;volcanic rock;bicycle lanes;"
    "antique clocks;school lunches;tropical fish;cotton shirts;space probes;folk tales;"
    "green tea;lighthouse keepers;frozen lakes;clay pots;radio waves;wild mushrooms;"
    "ballet dancers;electric cars;stone walls;rain barrels;goat cheese;sailing boats;"
    "piano lessons;vegetable soup;hospital nurses;video games;marble statues;"
    "underground caves;apple orchards;hiking trails;snow leopards;bamboo forests;tax forms;"
    "morning routines"
).split(";")
CLEAN = (
    "What should I know about {t} before I write an essay for school?",
    "Explain {t} to a child who has never heard of such a thing.",
    "Give me three reasons why people like {t}.",
    "Who was the first to study {t}, and what did they find?",
    "Tell me a short story in which {t} save the day.",
    "How have {t} changed over the last 50 years?",
    "I'm planning a talk about {t}; what would make a good opening line?",
    'My teacher said, "Nobody cares about {t}." Was she right?',
    "Compare {t} with something else that most people know well.",
    "Is it true that {t} were rare in the 1800s (or was that only in Europe)?",
    "Suggest a title for a documentary on {t}, please.",
    "At 7:30 I have to speak about {t} for 2 minutes. What do I say?",
    "Dr. Müller and Mr. O'Brien disagree about {t}. Who usually wins such a debate?",
    "Wow, {t}! Can you tell me more?",
    "How would NASA, the BBC or a well-known museum present {t} to visitors?",
)
ANSWER = "Here is what is known about {t}: they have a long history, and people value them for it."
# (kind, written, spoken): spoken None is a row to be dropped
DIRT: list[tuple[str, str, str | None]] = [
    ("url", "Summarise the page https://www.example.org/{n}/article about {t}.", None),
    ("url", "What does www.wiki-pages.net/{n} say of {t}?", None),
    ("url", "Write to me at info{n}@mail.example.com about {t}.", None),
    ("url", "Is example{n}.co.uk/shop a safe place to buy {t}?", None),
    (
        "url",
        "I read about {t} on Amazon.com last week. Is it worth the money?",
        "I read about {t} on Amazon dot com last week. Is it worth the money?",
    ),
    (
        "url",
        "Tell me what [this article](https://news.example.com/{n}) on {t} might be about.",
        "Tell me what this article on {t} might be about.",
    ),
    ("code", "What is this to {t}?\n```python\nfor x in range({n}):\n    print(x)\n```", None),
    ("code", "Fix my function about {t}: def count(items): return len(items) - {n}", None),
    ("code", "Why does SELECT name FROM things WHERE id = {n} not find {t}?", None),
    (
        "code",
        "Rename the variable number_of_{n}things in my script on {t}, it is called item_list.",
        None,
    ),
    ("code", "int total = {n};\nHow do I print it beside {t}?", None),
    ("code", "My file /home/user/data{n}/notes has text about {t}. How do I open it?", None),
    ("code", "int x;\nreturn {n};\nWhat is wrong here with {t}?", None),
    ("code", "import os\nDoes part {n} of it help with {t}?", None),
    ("code", "Two things matter;\nfirst, who buys {t}?", "Two things matter; first, who buys {t}?"),
    (
        "code",
        "Some people\nimport cars and {t}\nfrom Japan\nevery year, why?",
        "Some people. import cars and {t}. from Japan. every year, why?",
    ),
    (
        "code",
        "What does `sort` mean when it is said of {t}?",
        "What does sort mean when it is said of {t}?",
    ),
    ("code", "<div class='x{n}'>{t}</div> is what I wrote, what is wrong?", None),
    ("code", "import numpy as np\nHow do I count {t} with it, {n} at a time?", None),
    ("table", "Which row is best for {t}?\n| name | price |\n|---|---|\n| a | {n} |", None),
    ("table", "Sort this list of {t}:\nname\tprice\nfirst\t{n}\nsecond\t3", None),
    ("table", "Read this data on {t}:\nname,price,year\nred,{n},1999\nblue,7,2003\n", None),
    ("table", "+-----+-----+\n| {n} | two |\n+-----+-----+\nWhat does it say of {t}?", None),
    ("latex", r"Solve \frac{{x}}{{{n}}} = 2 and relate it to {t}.", None),
    ("latex", r"Explain $E = mc^2 + {n}$ with the help of {t}.", None),
    ("latex", r"What is \( \sum_i x_i \) for {n} values of {t}?", None),
    ("latex", "Prove that $$a^{{n}} + b^{{n}}$$ has to do with {t}, case {n}.", None),
    (
        "latex",
        "Let $x$ be the number of {t} in a town. What could $x$ be?",
        "Let x be the number of {t} in a town. What could x be?",
    ),
    ("emoji", "I really love {t} 😍🎉", "I really love {t}"),
    ("emoji", "Are {t} any good? 🤔 Tell me honestly.", "Are {t} any good? Tell me honestly."),
    ("emoji", "🚀 Write a slogan for {t}!", "Write a slogan for {t}!"),
    ("emoji", "Tell me a joke about {t} :)", "Tell me a joke about {t}"),
    ("emoji", "What does 🦊 have to do with {t}?", None),
    ("emoji", "Which emoji fits {t} best, 🐟 or 🐠?", None),
    ("emoji", "My friend answered 👍 when I asked about {t}. What did she mean?", None),
    ("markup", "Why are **{t}** so *popular* today?", "Why are {t} so popular today?"),
    ("markup", "# Task\nDescribe {t} in one sentence.", "Task. Describe {t} in one sentence."),
    (
        "markup",
        "Describe {t}:\n- their history\n- their use\n- their future",
        "Describe {t}: their history, their use, their future",
    ),
    (
        "markup",
        "<b>Important:</b> say something nice about {t}.<br>",
        "Important: say something nice about {t}.",
    ),
    ("markup", "Tom &amp; Anna both like {t} &mdash; why?", "Tom and Anna both like {t}, why?"),
    ("markup", "The best thing about {t} is ____.", "The best thing about {t} is blank."),
    ("markup", "Fill the gaps in [YOUR NAME]'s letter about {t}.", None),
    ("markup", "Dear {{{{customer}}}}, we have {n} offers on {t}. Is that polite?", None),
    ("scaffold", "Q: What makes {t} special?\nA:", "What makes {t} special?"),
    ("scaffold", "Question: How old are {t}?", "How old are {t}?"),
    (
        "lines",
        "I have a question.\n\nDo {t} need a lot of care?",
        "I have a question. Do {t} need a lot of care?",
    ),
    ("number", "My card is 4024 0071 5{n}3 9012, can I buy {t} with it?", None),
    ("number", "What is 3.14159265358{n} times the price of {t}?", None),
    ("number", "Ask for {t} on the telephone: 555-{n}-4567.", None),
    ("number", "The server 192.168.{n}.1 has a page on {t}, is it down?", None),
    ("number", "Order 9f8e7d6c5b4a{n}3f2e1d0c was for {t}. Where is it?", None),
    (
        "number",
        "There were 12,345,678 people at a show of {t}. Why?",
        "There were twelve million three hundred and forty-five thousand six hundred and "
        "seventy-eight people at a show of {t}. Why?",
    ),
    (
        "number",
        "Would you pay $25,000 for {t}?",
        "Would you pay twenty-five thousand dollars for {t}?",
    ),
    ("number", "What happened on 03/04/2021 to {t}?", None),
    ("number", "Between 1950 and 1975, who sold {t}?", "Between 1950 and 1975, who sold {t}?"),
    ("number", "My zip code is 9{n}0. Is there a shop for {t}?", None),
    ("number", "The PIN is 48{n} for the room with {t}, is that safe?", None),
    ("number", "Call 555{n}4567 now and ask for {t}.", None),
    ("number", "Would account 12345{n} pay for {t}?", None),
    ("number", "Is 1-800-FLOWERS the place to ask about {t}, part {n}?", None),
    ("number", "Is 3.5e-7 of all {t} a lot, part {n}?", None),
    ("number", "On page 3/10 of part {n} there is a picture of {t}. Why?", None),
    ("number", "Was it on July 4/5 that {t} came to town {n}?", None),
    ("number", "My friends rate {t} 3/5, part {n}. Why?", None),
    (
        "number",
        "A show of {t} drew 12000 people. Why?",
        "A show of {t} drew twelve thousand people. Why?",
    ),
    (
        "number",
        "Is a $1.5bn deal about {t} a good one?",
        "Is a 1.5 billion dollar deal about {t} a good one?",
    ),
    ("number", "Who would pay £3.2tn for {t}?", "Who would pay 3.2 trillion pounds for {t}?"),
    ("number", "Do {t} fit a $20 million-dollar home?", "Do {t} fit a 20 million dollar home?"),
    ("number", "Would you pay €2,50 for {t} in shop {n}?", None),
    ("number", "Is $5.5.5 the price of {t} in shop {n}?", None),
    ("url", "What do bit.ly/abc{n} and docs.python.dev/guide say of {t}?", None),
    ("url", "Is youtu.be/abc about {t}, part {n}?", None),
    ("url", "Look at notion.so/team and t.me/channel for {t}, part {n}.", None),
    ("url", "Why does localhost:8080 show {t}, part {n}?", None),
    ("symbol", "Explain dy/dx with the help of {t}, part {n}.", None),
    ("symbol", "Where does footnote¹ on {t} lead, part {n}?", None),
    (
        "symbol",
        "Could a resistor of 5 Ω be made of {t}?",
        "Could a resistor of 5 ohms be made of {t}?",
    ),
    (
        "symbol",
        "What is 3/4 + 1/8 of all {t}?",
        "What is three quarters plus one eighth of all {t}?",
    ),
    ("symbol", "How many percent is 5% of {n} {t}?", "How many percent is 5 percent of {n} {t}?"),
    (
        "symbol",
        "If I have {n} + 7 of {t}, and lose 3, what is left?",
        "If I have {n} plus 7 of {t}, and lose 3, what is left?",
    ),
    (
        "symbol",
        "Would {t} survive at -5°C & in the dark?",
        "Would {t} survive at -5 degrees Celsius and in the dark?",
    ),
    ("symbol", "Should he/she keep {t} at home?", "Should he or she keep {t} at home?"),
    ("symbol", "Is 1/2 of all {t} made by hand?", "Is one half of all {t} made by hand?"),
    ("symbol", "What follows: {t} → money → fame?", None),
    ("symbol", "Rate {t} like this: ★★★☆☆", None),
    ("symbol", "What do ∀x∃y say about {t}?", None),
    ("unicode", "What\u200b do you think of {t}\ufeff?", "What do you think of {t}?"),
    ("unicode", "Isn’t it “normal” to like {t}…", 'Isn\'t it "normal" to like {t}...'),
    ("unicode", "Ｗｈａｔ ａｒｅ {t}?", "What are {t}?"),
    ("unicode", "What does 谢谢 mean when people buy {t}?", None),
    ("unicode", "Почему люди любят {t}?", None),
    (
        "unicode",
        "What is the role of π in the shape of {t}?",
        "What is the role of pi in the shape of {t}?",
    ),
    (
        "length",
        "Tell me about {t}. " + "And then add a bit more about who made them and why. " * 9,
        None,
    ),
    (
        "length",
        "Describe incomprehensibly overcomplicated internationalization responsibilities of "
        + "institutionally underrepresented counterrevolutionaries, " * 6
        + "and of {t}.",
        None,
    ),
    ("long word", "Decode aGVsbG8gd29ybGQgdGhpcyBpcyBhIHNlY3JldCBtZXNzYWdl about {t}", None),
]
ANSWERS: list[tuple[str, str, bool]] = [  # (kind, answer, kept)
    ("deaf answer", "I'm sorry, but I can't hear audio. What about {t}?", False),
    ("deaf answer", "As a text-based AI, I don't have the ability to listen to {t}.", False),
    ("deaf answer", "I am unable to process audio, so please type your question on {t}.", False),
    ("deaf answer", "I don’t have ears, so I cannot say how {t} sound.", False),
    ("deaf answer", "Sorry, I cannot hear you. What was it about {t}?", False),
    ("as an AI", "As an AI language model, it is hard to speak of {t}.", False),
    ("as an AI", "I have no opinion of {t}, as an AI.", False),
    ("as an AI", "As an AI language model, I have no opinion about {t}.", False),
    ("as an AI", "I'm just an AI assistant and have never seen {t}.", False),
    ("repetition", "They are good for you and for me and for all. " * 12 + "{t}", False),
    ("empty answer", "", False),
    ("empty answer", " ... ", False),
    ("good answer", "Here you are:\n```python\nprint('{t}')\n```\nSee https://a.io 😀", True),
    ("good answer", "| {t} | price |\n|---|---|\n| one | $5 |", True),
    ("good answer", "An AI researcher said that deaf people can feel {t} as vibrations.", True),
    ("good answer", "Much can be done with {t}, such as an AI system that counts them.", True),
    ("good answer", "I'm a big AI fan, and {t} are what I draw with it.", True),
    ("good answer", "I am not able to listen to music at work, so I read about {t}.", True),
    ("good answer", "Many a text-based game is about {t}; I would listen to its soundtrack.", True),
]
FOREIGN = (
    "Peux-tu m'expliquer pourquoi les gens aiment {t} et comment cela a commencé?",
    "Quels sont les avantages et les inconvénients de {t} pour une petite ville?",
    "Kannst du mir bitte erklären, warum so viele Menschen {t} mögen?",
    "Schreibe eine kurze Geschichte über {t}, die auch Kindern gefällt.",
    "¿Puedes explicarme por qué a la gente le gusta tanto {t} en verano?",
    "Escribe un poema corto sobre {t} para el cumpleaños de mi abuela.",
    "Puoi spiegarmi perché alle persone piace così tanto {t} durante l'inverno?",
    "Por favor, escreva uma história curta sobre {t} para os meus alunos.",
    "Czy możesz mi wyjaśnić, dlaczego ludzie tak bardzo lubią {t}?",
    "Kun je mij uitleggen waarom zoveel mensen van {t} houden?",
)
NOUNS = "museum;radio;hotel;piano;taxi;tomate;opera;banana;safari;tennis;yoga;pizza".split(";")
ENGLISH_ALL_THE_SAME = (  # that hold words of other languages, or next to none
    "How do you say good morning in French, and what does bon appetit mean for {t}?",
    "Who wrote Les Miserables, and did he care about {t}?",
    "Define {t}.",
    "Why {t}?",
    "What does the German word Schadenfreude have to do with {t}?",
)
LONG = (
    "I have been thinking about {t} for a while now because my neighbour keeps telling me that "
    "they are the most important thing in the world, and I would like to know whether she is right."
)
EVALUATION = (
    "Which of the following best describes how {t} were seen by most people of the time?",
    "What is the name of the process that makes {t} possible in nature?",
    "How many {t} fit in a box?",
)


@dataclass(frozen=True)
class Planted:
    """Row number `row` of texts.jsonl; `expect`: keep, rewrite or drop; `spoken`: its prompts as
    they should be, if it is not dropped."""

    row: int
    kind: str
    expect: str
    spoken: list[str]


class _Set:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.labels: list[tuple[str, str, list[str]]] = []

    def add(
        self,
        kind: str,
        turns: list[str],
        spoken: list[str] | None,
        answer: str | None = None,
        roles: str = "ua",
    ) -> None:
        names = {"u": "user", "a": "assistant", "s": "system"}
        if answer is not None:
            turns = [*turns, answer]
        messages = [
            {"role": names[roles[i % len(roles)]], "content": t} for i, t in enumerate(turns)
        ]
        prompts = [m["content"] for m in messages if m["role"] == "user"]
        expect = "drop" if spoken is None else "keep" if spoken == prompts else "rewrite"
        self.rows.append({"messages": messages})
        self.labels.append((kind, expect, spoken or []))


def make(seed: int = 0) -> tuple[list[dict[str, Any]], list[Planted], list[str]]:
    """(rows, labels, questions of the evaluation)."""
    rng, made = random.Random(seed), _Set()
    number = itertools.count(101)  # keeps templates with a number apart

    def topics(many: int) -> list[str]:
        return rng.sample(TOPICS, many)

    def one(kind: str, text: str, spoken: str | None, answer: str, t: str) -> None:
        n = next(number)
        filled = None if spoken is None else [spoken.format(t=t, n=n)]
        made.add(kind, [text.format(t=t, n=n)], filled, answer.format(t=t))

    for text in CLEAN:
        for t in topics(60):
            one("clean", text, text, ANSWER, t)
    for kind, text, spoken in DIRT:
        for t in topics(14):
            one(kind, text, spoken, ANSWER, t)
    for kind, answer, kept in ANSWERS:
        text = (
            "Please say "
            + {True: "something", False: "anything"}[kept]
            + " on {t}, part {n}, in style {n}."
        )
        for t in topics(14):
            one(kind, text, text if kept else None, answer, t)
    for text in FOREIGN:
        for t in rng.sample(NOUNS, 8):
            one("language", text, None, "1. {t}, 2. {t}", t)
    for text in ENGLISH_ALL_THE_SAME:
        for t in topics(14):
            one("language, English", text, text, ANSWER, t)
    for t in topics(40):  # near-duplicates: the first stays
        text = LONG.format(t=t)
        made.add("clean", [text], [text], ANSWER.format(t=t))
        for again in (text, text.upper(), f"{text[:-1]} or not.", text.replace(" now", "")):
            made.add("near-duplicate", [again], None, f"Yes, {t} matter.")
    for t in topics(30):  # alike, and all the same another question
        for n in (12, 15):
            text = f"A shop sells {n} boxes of {t} every day and twice as many on Sundays. How many boxes of {t} are sold in a week, and how many in 4 weeks?"  # noqa: E501
            made.add("near miss", [text], [text], f"{n} times 8 a week.")
    questions = [text.format(t=t) for text in EVALUATION for t in TOPICS[:20]]
    for question in questions:
        made.add("evaluation", [question], None, "The second one.")
        made.add(
            "evaluation", [f"Think first. {question.upper()} Answer with a letter."], None, "B."
        )
    for t in topics(20):
        text = f"Which of the following best describes {t}: a hobby, a trade or an art?"
        made.add("evaluation, near miss", [text], [text], "An art.")
    for t in topics(25):
        first, again = f"What do you know of {t}?", f"And who sells {t} in winter?"
        made.add("several turns", [first, "A little.", again, "Shops."], [first, again])
        link = f"{again} See https://a.io/x"
        made.add("several turns", [first + " Tell me.", "A little.", link, "Yes."], None)
        cut = f"Would you call {t} a luxury?"
        made.add("unanswered", [cut, "No.", "Why not?"], [cut])
        made.add("unanswered", [f"Nobody answers this about {t}."], None)
        made.add(
            "system message", ["Answer as a pirate.", f"Who likes {t}?", "Arr!"], None, roles="sua"
        )
        made.add("order", ["Welcome!", f"Who dislikes {t}?"], None, roles="au")
        made.add("order", [f"Who draws {t}?", f"Who paints {t}?", "Artists."], None, roles="uua")
        made.add("empty prompt", ["?!"], None, f"What about {t}?")
    order = list(range(len(made.rows)))
    # shuffled but for near-duplicates, whose first must come first
    fixed = [i for i in order if made.labels[i][0] == "near-duplicate"]
    free = [i for i in order if made.labels[i][0] != "near-duplicate"]
    rng.shuffle(free)
    order = free + fixed
    rows = [made.rows[i] for i in order]
    labels = [Planted(row, *made.labels[i]) for row, i in enumerate(order)]
    return rows, labels, questions


def write(folder: Path, seed: int = 0) -> list[Planted]:
    rows, labels, questions = make(seed)
    for name, lines in (
        ("texts", rows),
        ("evaluation", [{"question": question} for question in questions]),
    ):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
    return labels


def curated(folder: Path) -> list[Conversation]:
    """Conversations of a finished artifact."""
    return [conversation_of(row) for row in shards.read_rows(folder)]


def here(function: Any, tasks: list[tuple], workers: int, device: str) -> Any:
    """An engine that runs the tasks in this process: for tests, in which starting workers would
    take the time."""
    yield from (function(*task) for task in tasks)


def job(folder: Path) -> dict[str, Any]:
    """The configuration that curates what `write` wrote, all steps in the recipe's order."""
    steps: list[dict[str, Any]] = [
        {"_component_": f"speechfuse.texts.{name}"}
        for name in ("turns", "overlap", "answers", "speakable", "language", "length", "duplicates")
    ]
    steps[1]["evaluations"] = [
        {
            "_component_": "speechfuse.texts.Columns",
            "path": str(folder / "evaluation.jsonl"),
            "prompt": "question",
        }
    ]
    return {
        "out": str(folder / "curated"),
        "texts": [
            {
                "_component_": "speechfuse.texts.Messages",
                "path": str(folder / "texts.jsonl"),
                "licence": "cc0-1.0",
            }
        ],
        "steps": steps,
        "shard_size": 700,
        "runtime": {"workers": 1, "engine": {"_component_": "tests.dirty_texts.here"}},
    }


@dataclass
class Outcome:
    """Of one kind: rows planted, and what became of them. Wrong are the last four."""

    planted: int = 0
    kept: int = 0
    rewritten: int = 0
    dropped: int = 0
    lost: int = 0  # should have been kept
    unspeakable: int = 0  # should have been dropped
    misread: int = 0  # kept with another text than it should have


def outcomes(labels: list[Planted], curated: list[Any]) -> tuple[dict[str, Outcome], list[str]]:
    """By kind; and a line for each row that became what it should not. `curated`: Conversations."""
    found = {int(c.id.rpartition("/")[2]): c for c in curated}
    table: dict[str, Outcome] = {}
    wrong = []
    for label in labels:
        mine = table.setdefault(label.kind, Outcome())
        mine.planted += 1
        if label.row not in found:
            mine.dropped += 1
            mine.lost += label.expect != "drop"
            if label.expect != "drop":
                wrong.append(f"lost {label.row} ({label.kind}): {label.spoken}")
            continue
        prompts = found[label.row].prompts
        same = label.expect == "keep" or "original" not in found[label.row].extra
        mine.kept += same
        mine.rewritten += not same
        if label.expect == "drop":
            mine.unspeakable += 1
            wrong.append(f"spoken {label.row} ({label.kind}): {prompts}")
        elif prompts != label.spoken:
            mine.misread += 1
            wrong.append(f"misread {label.row} ({label.kind}): {prompts}, not {label.spoken}")
    return table, wrong

"""Rows of a comparison: ways of fusing speech into one language model, and which to take for what.

In: a checkpoint's results for each row. Out: the scores of each, Markdown with a table and a plot,
and sentences that follow from the scores alone.
"""

from dataclasses import dataclass, field
from typing import Any

from speechfuse.config import key
from speechfuse.report import choice, page, plots, tables
from speechfuse.report.media import Media
from speechfuse.report.results import Checkpoint, Key, Measure, ResultFile
from speechfuse.report.results import key as key_of
from speechfuse.report.sections import section
from speechfuse.scores.intervals import Score

ON = "_speech_on"
COSTS = {  # titles of what a row costs: (task, split, metric), and how its number is written
    "trained parameters": ("training", "all", "parameters"),
    "training tokens": ("training", "all", "tokens"),
    "minutes of training": ("training", "all", "minutes"),
    "seconds to the first token": ("first_token", "all", "seconds"),
}
FORMS = {"parameters": "{:,.0f}", "tokens": "{:,.0f}", "minutes": "{:.1f}", "seconds": "{:.3f}"}
SCORES = (
    "± is half the width of a 95 % bootstrap interval; seeds, of which this is one, differ by "
    "about as much. wer: word errors for each word that was said; lower is better, and more than "
    "1 is possible where words are invented."
)
TEXT = (
    "The base model's own questions in writing. *on*: loaded as for speech, LoRA active. *off*: "
    "the bare language model of the same folder (none: what was trained is merged into it). "
    "*kept*: the mean of the columns *on*, each divided by the base's. text_replies: whole "
    "replies, word for word."
)
COSTS_ARE = (
    "Tokens and minutes are of whole trainings, also the epochs after the one shown; minutes and "
    "seconds depend on what else the machine did. A cascade's are its recognizer's, and its first "
    "token comes after all that the recognizer says."
)


@dataclass
class Row:
    name: str = key("of the row, and of its results")
    about: str = key("what it is, in a few words")
    trainings: list[str] = key("folders of its trainings, in order", [])
    checkpoint: str | None = key("its folder, where it is not an epoch of the last training", None)
    prompt: str = key("how it is asked; {speech} stands for the audio", "{speech}")
    recognizer: str | None = key("the row whose words it reads", None)
    listens: bool = key("false: it reads what was said", True)
    base: str | None = key("the row of its language model, where that is another", None)


@dataclass
class Table:
    """The rows with their results; `base` is the row of the untrained language model, `separable`
    names the rows whose speech part can be off."""

    rows: list[Row]
    of: dict[str, Checkpoint]
    base: str
    listening: Measure
    text: list[Measure]
    separable: set[str]
    costs: dict[str, list[Score]] = field(default_factory=dict)

    def add(self, name: str, scores: list[Score]) -> None:
        """Add scores that no result file has."""
        self.costs.setdefault(name, []).extend(scores)

    def scores(self, name: str) -> list[Score]:
        return [*self.of[name].scores.values(), *self.costs.get(name, [])]

    def score(self, name: str, of: Key) -> Score | None:
        return next((score for score in self.scores(name) if key_of(score) == of), None)

    def value(self, name: str, of: Key) -> float | None:
        score = self.score(name, of)
        return None if score is None else score.value

    def base_of(self, name: str) -> str:
        """Return the row of the language model that a row was trained from."""
        return next(row.base for row in self.rows if row.name == name) or self.base

    def kept(self, name: str) -> float | None:
        """Return the mean share of the base's text scores that a row has while it listens; None
        where it lacks one."""
        shares, of = [], self.base_of(name)
        for measure in self.text:
            own = self.value(name, (measure.task, measure.split + ON, measure.metric))
            base = self.value(of, key_of(measure))
            if own is None or not base:
                return None
            shares.append(own / base)
        return sum(shares) / len(shares)

    def equal_replies(self, name: str, on: bool) -> tuple[int, int]:
        """Return how many replies in writing are the base's, and how many there are."""
        own, base = (self._replies(each, on) for each in (name, self.base_of(name)))
        return sum(base.get(place) == reply for place, reply in own.items()), len(own)

    def _replies(self, name: str, on: bool) -> dict[Any, Any]:
        files: list[ResultFile] = []
        for measure in self.text:
            of = measure.task, measure.split + ON * on, measure.metric
            files += [f for f in self.of[name].files.values() if of in f.scores and f not in files]
        return {
            (item["id"], item["split"].removesuffix(ON)): item.get("said", item.get("answer"))
            for file in files
            for item in file.items
        }

    def heard(self, name: str) -> float | None:
        """Return how well a row listens."""
        return self.value(name, key_of(self.listening))

    def best(self, names: list[str]) -> list[str]:
        """Return those of `names` that do not listen significantly worse than the best of them,
        which comes first. Differences are paired by question."""
        of = key_of(self.listening)
        order = sorted(names, key=lambda name: -self.of[name].scores[of].value)
        return choice.best(self.of, order, of, True)[0]

    @property
    def listeners(self) -> list[str]:
        """Return the rows that listen and whose listening was scored."""
        return [r.name for r in self.rows if r.listens and self.heard(r.name) is not None]

    def sentences(self) -> dict[str, str]:
        """Return, by what one may be after, which row to take and why."""
        if not (names := self.listeners):
            return {}
        best = self.best(names)
        return {
            "Best listening": self._best_listening(best),
            "Text untouched": self._text_untouched(names),
            "Cheapest training": self._cheapest_training(names, best),
        }

    def _shown(self, name: str) -> str:
        return f"{name} ({self.heard(name):.3f})"

    def _best_listening(self, best: list[str]) -> str:
        top, *ties = best
        sentence = f"take {top}, which answers {self.heard(top):.3f} of the spoken questions"
        if (kept := self.kept(top)) is not None:
            sentence += f" and keeps {kept:.3f} of the base's scores in writing while it listens"
        if ties:
            sentence += f"; not significantly worse: {', '.join(map(self._shown, ties))}"
        if (read := self.heard(self.base)) is not None:
            sentence += f". Where the base reads the questions it answers {read:.3f}"
        return f"{sentence}."

    def _text_untouched(self, names: list[str]) -> str:
        on, off = ({n: self.equal_replies(n, state) for n in names} for state in (True, False))
        always = [name for name, (equal, count) in on.items() if equal == count > 0]
        at_times = [n for n, (equal, of) in off.items() if equal == of > 0 and n not in always]
        sentences = []
        if always:
            top, *_ = self.best(always)
            more = [name for name in always if name != top]
            sentences.append(
                f"take {top}: all {on[top][1]:,} answers in writing are the base's, also while it "
                f"listens, and it answers {self.heard(top):.3f} of the spoken questions"
                + f"; the same is true of {', '.join(map(self._shown, more))}"
                * bool(more)
            )
        if at_times:
            top = max(self.best(at_times), key=lambda name: self.kept(name) or 0.0)
            sentences.append(
                f"{'Or ' * bool(always)}take {top}, which answers {self.heard(top):.3f}: its "
                "answers in writing are the base's whenever its speech part is off, and while it "
                f"listens {on[top][0]:,} of {on[top][1]:,} are"
            )
        if not sentences:
            return "no row leaves every reply in writing as it was."
        return f"{'. '.join(sentences)}."

    def _cheapest_training(self, names: list[str], best: list[str]) -> str:
        minutes = {n: m for n in names if (m := self.value(n, COSTS["minutes of training"]))}
        if not minutes:
            return "no row was trained."
        ranks = {name: (took, -(self.heard(name) or 0.0)) for name, took in minutes.items()}
        first = min(minutes, key=ranks.__getitem__)
        sentence = (
            f"take {first}, {minutes[first]:.1f} minutes of steps, which answers "
            f"{self.heard(first):.3f} of the spoken questions"
        )
        good = [name for name in best if name in minutes]
        if good and first not in good:
            cheap = min(good, key=ranks.__getitem__)
            sentence += f"; of those that listen best {cheap} is the cheapest"
            sentence += f", {minutes[cheap]:.1f} minutes"
        return f"{sentence}."

    def markdown(
        self,
        more: list[Measure],
        about: dict[str, str],
        legend: dict[str, str],
        rule: str,
        media: Media,
    ) -> str:
        """Return the page: which row to take, a plot, and tables of scores and of costs. `about`
        says what each row is, `legend` what names of scores mean, `rule` how its epoch was
        chosen."""
        measures = [self.listening, *more]
        text = [(m.task, m.split + end, m.metric) for m in self.text for end in (ON, "")]
        head, texts = ["row", *("\n".join(key_of(m)) for m in measures)], ["row", "kept, on"]
        texts += ["\n".join((m.task, m.split, end)) for m in self.text for end in ("on", "off")]
        scores, written, costs, points = [], [], [], {}
        for row in self.rows:
            name, kept = row.name, self.kept(row.name)
            off = [] if name in self.separable else [key_of(m) for m in self.text]
            cells = ["none" if of in off else self._cell(name, of) for of in text]
            scores.append([name, *(self._cell(name, key_of(measure)) for measure in measures)])
            written.append([name, "" if kept is None else f"{kept:.3f}", *cells])
            costs.append([name, *(self._cell(name, of) for of in COSTS.values())])
            score = self.score(name, key_of(self.listening))
            if score and kept is not None:
                points[name] = kept, score
        plot = plots.fusions(points, " ".join(key_of(self.listening)))
        lines, names = (
            "\n".join(f"- **{page.escape(n)}**: {page.escape(text)}" for n, text in each.items())
            for each in (about, legend)
        )
        blocks = [
            "# Ways of fusing speech into one language model",
            *(f"**{what}**: {page.escape(text)}" for what, text in self.sentences().items()),
            media.plot("fusions", plot, "spoken questions answered, against text kept"),
            *section("Rows", lines, page.escape(rule)),
            *section("Listening", SCORES, names, page.table(head, scores)),
            *section("Text", TEXT, page.table(texts, written)),
            *section("Costs", COSTS_ARE, page.table(["row", *COSTS], costs)),
        ]
        return "\n\n".join(filter(None, blocks)) + "\n"

    def _cell(self, name: str, of: Key) -> str:
        if (score := self.score(name, of)) is None:
            return ""
        return FORMS[of[2]].format(score.value) if of[2] in FORMS else tables.shown(score)

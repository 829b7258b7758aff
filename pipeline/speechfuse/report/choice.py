"""Which epoch to take, by a rule stated beforehand, and bounds on scores.

In: the results of one protocol, in order of training. Out: the chosen checkpoint with the reason in
sentences, and of each bound whether it is kept. Used by stages.report and stages.gate.
"""

from dataclasses import asdict, dataclass, field

from speechfuse.report.differences import difference
from speechfuse.report.results import (
    Failure,
    Key,
    ResultsByCheckpoint,
    key,
    lower_is_better,
    of_run,
)

BOUNDS = ("at_least", "at_most", "of_base_at_least")


@dataclass
class Floor:
    """A bound on one score: exactly one of the last three keys."""

    task: str
    split: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    of_base_at_least: float | None = None


@dataclass
class Measure:
    task: str
    split: str
    metric: str


@dataclass
class Rule:
    """Of the epochs of run `choose_from` that keep the bounds `under`, the one with the best value.
    Of those that tie with it the best by each measure of `then` in turn, and of those that are left
    the earliest."""

    choose_from: str = field(metadata={"help": "run whose epochs compete"})
    task: str = field(metadata={"help": "task of the value"})
    split: str = field(metadata={"help": "its split, which no column of the table may be of"})
    metric: str = field(metadata={"help": "its metric; of wer and cer less is better"})
    protocol: str = field(default="clean", metadata={"help": "protocol of its results"})
    under: list[Floor] = field(
        default_factory=list,
        metadata={"help": "{task, split, metric, at_least | at_most | of_base_at_least}"},
    )
    paired: bool = field(
        default=True,
        metadata={
            "help": "an epoch ties that a paired bootstrap at 95 % does not find worse; "
            "false: equal values tie"
        },
    )
    then: list[Measure] = field(
        default_factory=list, metadata={"help": "{task, split, metric} that decide ties, in order"}
    )

    def stated(self) -> str:
        """The rule in a sentence."""
        extreme = "lowest" if lower_is_better(self.metric) else "highest"
        bounds = [
            f"{' '.join(key(floor))} {name} {limit}"
            for floor in self.under
            for name, limit in asdict(floor).items()
            if name in BOUNDS and limit is not None
        ]
        kept = f" that keep {' and '.join(bounds)}" if bounds else ""
        ties = "those not significantly worse" if self.paired else "equals"
        untested = "" if self.paired else " Differences are not tested: a small one decides."
        then = "".join(f" the best {' '.join(key(measure))}, then" for measure in self.then)
        return (
            f"The rule: among the epochs of {self.choose_from}{kept} the one with the {extreme} "
            f"{self.metric} on {self.task}, split {self.split}; of {ties}{then} the earliest."
            f"{untested} No column under Results is of that split."
        )


@dataclass(frozen=True)
class Choice:
    checkpoint: str
    reasons: list[str]


def choose(found: ResultsByCheckpoint, rule: Rule, base: str, failures: list[Failure]) -> Choice:
    """The epoch that `rule` picks, and why.

    An epoch without a score that the rule needs is left out when one of its cells failed; else it
    is a ValueError, as are no epochs at all, and none that keeps the bounds.
    """
    epochs, failed = of_run(found, rule.choose_from), {failure.checkpoint for failure in failures}
    lost = [n for n in sorted(failed - found.keys()) if n.startswith(f"{rule.choose_from}/")]
    reasons = [f"{name} is left out: none of its cells succeeded." for name in lost]
    if not epochs and not lost:
        raise ValueError(f"no results of rule.choose_from={rule.choose_from}: run stages.evaluate")
    for of in dict.fromkeys(map(key, [rule, *rule.under, *rule.then])):
        without = [name for name in epochs if of not in found[name].scores]
        if known := [name for name in without if name not in failed]:
            raise ValueError(
                f"rule: no {' '.join(of)} of {', '.join(known)}: run stages.evaluate on it"
            )
        for name in without:
            reasons.append(f"{name} is left out: its {' '.join(of)} is missing, as a cell failed.")
        epochs = [name for name in epochs if name not in without]
    for floor in rule.under:
        judged = {name: judge(floor, found, name, base) for name in epochs}
        for name, (good, line) in judged.items():
            reasons += [] if good else [f"{name} is left out: {' '.join(line.split())}."]
        epochs = [name for name, (good, _) in judged.items() if good]
    if not epochs:
        raise ValueError(
            f"no epoch of {rule.choose_from} may be chosen: {' '.join(reasons)} Evaluate again, or "
            "change rule.under"
        )
    for measure in (rule, *rule.then):
        epochs, reason, _ = best(found, epochs, key(measure), rule.paired)
        reasons.append(reason)
        if len(epochs) == 1:
            break
    else:
        reasons.append(f"The earliest of these is {epochs[0]}.")
    return Choice(epochs[0], reasons)


def best(
    found: ResultsByCheckpoint, epochs: list[str], of: Key, test: bool
) -> tuple[list[str], str, bool]:
    """The epochs that tie for the best value, in order, a sentence about them, and whether every
    epoch was tested against the best."""
    sign, top = -1 if lower_is_better(of[2]) else 1, first(found, epochs, of)
    values = {name: found[name].scores[of].value for name in epochs}
    ties, told, untested = [], [], False
    for name in epochs:
        cells = found[top].cell(of), found[name].cell(of)
        between = difference(*cells, of) if test and name != top else None
        if between:
            value, low, high = between
            if (high if sign > 0 else -low) >= 0:
                ties.append(name)
                told.append(f"{name} ({value:+.3f} [{low:+.3f}, {high:+.3f}])")
        else:
            untested |= test and name != top
            if values[name] == values[top]:
                ties.append(name)
                told += [name] if name != top else []
    extreme = "lowest" if sign < 0 else "highest"
    reason = f"{top} has the {extreme} {' '.join(of)}, {values[top]:.3f}"
    if len(epochs) == 1:
        reason = f"Only {top} competes, {' '.join(of)} {values[top]:.3f}"
    elif told:
        reason += f"; {'not significantly worse' if test else 'equal'}: {', '.join(told)}"
    elif not untested:
        reason += f"; {'every other is significantly worse' if test else 'no other is equal'}"
    if untested:
        reason += " (point estimates: the results hold no per-item numbers to test)"
    return ties, f"{reason}.", test and not untested


def first(found: ResultsByCheckpoint, epochs: list[str], of: Key) -> str:
    """The epoch of the best value, of equals the earliest."""
    sign = -1 if lower_is_better(of[2]) else 1
    return max(epochs, key=lambda name: sign * found[name].scores[of].value)


def of_base(found: ResultsByCheckpoint, name: str, of: Key, base: str) -> float | None:
    """Value over the base's value; None where the base has none, or zero."""
    whole = found[base].scores[of].value if base in found and of in found[base].scores else 0.0
    return found[name].scores[of].value / whole if whole else None


def judge(floor: Floor, found: ResultsByCheckpoint, name: str, base: str) -> tuple[bool, str]:
    """Whether checkpoint `name` keeps `floor`, and a line that says so; no score is a miss."""
    of = key(floor)
    what = " ".join(of)
    bounds = {b: limit for b, limit in asdict(floor).items() if b in BOUNDS and limit is not None}
    if len(bounds) != 1:
        raise ValueError(
            f"floors: {what} needs exactly one of {', '.join(BOUNDS)}; it has "
            f"{', '.join(bounds) or 'none'}"
        )
    [(bound, limit)] = bounds.items()
    value = found[name].scores[of].value if of in found[name].scores else None
    if value is not None and bound == "of_base_at_least":
        value = of_base(found, name, of, base)
    if value is None:
        return False, f"MISSING  {what}: no such score, {bound} {limit}"
    good = value <= limit if bound == "at_most" else value >= limit
    verdict = "ok" if good else "ABOVE" if bound == "at_most" else "BELOW"
    return good, f"{verdict:8} {what}: {value:.3f}, {bound} {limit}"

"""Select an epoch by a rule that was stated beforehand, and check bounds on its scores.

In: the results of one protocol, in order of training. Out: the chosen checkpoint with the reasons
in sentences, and for each bound whether it holds. Used by stages.report and stages.gate.
"""

from dataclasses import asdict, dataclass

from speechfuse import config
from speechfuse.report.differences import difference
from speechfuse.report.results import (
    Checkpoints,
    Failure,
    Key,
    Measure,
    key,
    lower_is_better,
    of_run,
)

BOUNDS = ("at_least", "at_most", "of_base_at_least")


@dataclass
class Floor(Measure):
    """A bound on one score. Exactly one of the three keys is given; `of_base_at_least` bounds the
    score divided by the base's."""

    at_least: float | None = None
    at_most: float | None = None
    of_base_at_least: float | None = None

    def bounds(self) -> dict[str, float]:
        return {n: limit for n, limit in asdict(self).items() if n in BOUNDS and limit is not None}


@dataclass
class Rule:
    """Select, among the epochs of run `choose_from` that keep the bounds `under`, the best value.
    Ties go to the best by each measure of `then` in turn, then to the earliest epoch."""

    choose_from: str = config.key("run whose epochs compete")
    task: str = config.key("task of the value")
    split: str = config.key("its split, which no column of the table may be of")
    metric: str = config.key("its metric; of wer and cer less is better")
    protocol: str = config.key("protocol of its results", "clean")
    under: list[Floor] = config.key(
        "{task, split, metric, at_least | at_most | of_base_at_least}", []
    )
    paired: bool = config.key(
        "a tie is what a paired bootstrap at 95 % does not find worse; false: an equal value", True
    )
    then: list[Measure] = config.key("{task, split, metric} that decide ties, in order", [])

    def stated(self, table: bool = True) -> str:
        """Return the rule in a sentence; `table`: whether the report has a table of results."""
        extreme = "lowest" if lower_is_better(self.metric) else "highest"
        bounds = [
            f"{' '.join(key(floor))} {name} {limit}"
            for floor in self.under
            for name, limit in floor.bounds().items()
        ]
        within = f" that keep {' and '.join(bounds)}" if bounds else ""
        ties = "those not significantly worse" if self.paired else "equals"
        untested = "" if self.paired else " Differences are not tested: a small one decides."
        then = "".join(f" the best {' '.join(key(measure))}, then" for measure in self.then)
        return (
            f"The rule: among the epochs of {self.choose_from}{within} the one with the {extreme} "
            f"{self.metric} on {self.task}, split {self.split}; of {ties}{then} the earliest."
            f"{untested}{' No column under Results is of that split.' * table}"
        )


@dataclass(frozen=True)
class Choice:
    checkpoint: str
    reasons: list[str]


def choose(results: Checkpoints, rule: Rule, base: str | None, failures: list[Failure]) -> Choice:
    """Return the epoch that `rule` picks, and why.

    An epoch that lacks a score of the rule is left out if one of its tasks failed. Raises
    ValueError for an epoch that lacks a score although none of its tasks failed, if there are no
    epochs, and if no epoch keeps the bounds.
    """
    epochs, failed = of_run(results, rule.choose_from), {f.checkpoint for f in failures}
    lost = [n for n in sorted(failed - results.keys()) if n.startswith(f"{rule.choose_from}/")]
    reasons = [f"{name} is left out: none of its cells succeeded." for name in lost]
    if not epochs and not lost:
        raise ValueError(f"no results of rule.choose_from={rule.choose_from}: run stages.evaluate")
    for of in dict.fromkeys(map(key, [rule, *rule.under, *rule.then])):
        without = [name for name in epochs if of not in results[name].scores]
        if unevaluated := [name for name in without if name not in failed]:
            raise ValueError(f"rule: no {' '.join(of)} of {', '.join(unevaluated)}: evaluate it")
        for name in without:
            reasons.append(f"{name} is left out: its {' '.join(of)} is missing, as a cell failed.")
            epochs.remove(name)
    for floor in rule.under:
        for name in list(epochs):
            within, line = judge(floor, results, name, base)
            if not within:
                reasons.append(f"{name} is left out: {' '.join(line.split())}.")
                epochs.remove(name)
    if not epochs:
        raise ValueError(
            f"no epoch of {rule.choose_from} may be chosen: {' '.join(reasons)} Evaluate again, or "
            "change rule.under"
        )
    for measure in (rule, *rule.then):
        epochs, reason, _ = best(results, epochs, key(measure), rule.paired)
        reasons.append(reason)
        if len(epochs) == 1:
            break
    else:
        reasons.append(f"The earliest of these is {epochs[0]}.")
    return Choice(epochs[0], reasons)


def best(
    results: Checkpoints, epochs: list[str], of: Key, test: bool
) -> tuple[list[str], str, bool]:
    """Return the epochs that tie for the best value, in order, a sentence about them, and whether
    every epoch was tested against the best. Without `test` only equal values tie."""
    sign, top = -1 if lower_is_better(of[2]) else 1, first(results, epochs, of)
    best_value = results[top].scores[of].value
    ties, others, untested = [], [], False
    for name in epochs:
        tested = test and name != top
        interval = difference(results[top].file(of), results[name].file(of), of) if tested else None
        untested |= tested and interval is None
        if interval:
            value, low, high, _ = interval
            tie = (high if sign > 0 else -low) >= 0
            text = f" ({value:+.3f} [{low:+.3f}, {high:+.3f}])"
        else:
            tie, text = results[name].scores[of].value == best_value, ""
        if tie:
            ties.append(name)
            others += [name + text] if name != top else []
    reason = f"{top} has the {'lowest' if sign < 0 else 'highest'} {' '.join(of)}, {best_value:.3f}"
    if len(epochs) == 1:
        reason = f"Only {top} competes, {' '.join(of)} {best_value:.3f}"
    elif others:
        reason += f"; {'not significantly worse' if test else 'equal'}: {', '.join(others)}"
    elif not untested:
        reason += f"; {'every other is significantly worse' if test else 'no other is equal'}"
    if untested:
        reason += " (point estimates: the results hold no per-item numbers to test)"
    return ties, f"{reason}.", test and not untested


def first(results: Checkpoints, epochs: list[str], of: Key) -> str:
    """Return the epoch of the best value; of equals the earliest."""
    sign = -1 if lower_is_better(of[2]) else 1
    return max(epochs, key=lambda name: sign * results[name].scores[of].value)


def of_base(results: Checkpoints, name: str, of: Key, base: str | None) -> float | None:
    """Return the value divided by the base's; None where the base has no such score, or zero."""
    scores = results[base].scores if base in results else {}
    whole = scores[of].value if of in scores else 0.0
    return results[name].scores[of].value / whole if whole else None


def judge(floor: Floor, results: Checkpoints, name: str, base: str | None) -> tuple[bool, str]:
    """Return whether checkpoint `name` keeps `floor`, and a line that says so. A checkpoint without
    the score does not keep it. Raises ValueError for a floor without exactly one bound."""
    of, bounds = key(floor), floor.bounds()
    what = " ".join(of)
    if len(bounds) != 1:
        raise ValueError(
            f"floors: {what} needs exactly one of {', '.join(BOUNDS)}; it has "
            f"{', '.join(bounds) or 'none'}"
        )
    [(bound, limit)] = bounds.items()
    scores = results[name].scores
    value = scores[of].value if of in scores else None
    if value is not None and bound == "of_base_at_least":
        value = of_base(results, name, of, base)
    if value is None:
        return False, f"MISSING  {what}: no such score, {bound} {limit}"
    within = value <= limit if bound == "at_most" else value >= limit
    verdict = "ok" if within else "ABOVE" if bound == "at_most" else "BELOW"
    return within, f"{verdict:8} {what}: {value:.3f}, {bound} {limit}"

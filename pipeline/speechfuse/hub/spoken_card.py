"""What the card of a spoken dataset says that others have not: kinds, voices, sources, curation.

In: the totals and the configuration of stages.synthesize_instructions. Out: parts of the Markdown
that speechfuse.hub.cards fills its template with.
"""

from collections.abc import Iterator
from typing import Any

SHOWN = 20  # voices by name; of more only how many and how even


def statistics(totals: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of the table of figures."""
    for kind, of in totals["kinds"].items():
        yield f"samples of the kind `{kind}`", f"{of['made']:,} of {of['planned']:,} planned"
    voices = totals["voices"]
    if voices:
        least, most = min(voices.values()), max(voices.values())
        yield "voices", f"{len(voices):,}, each in {least:,} to {most:,} pieces of speech"
    if 0 < len(voices) <= SHOWN:
        yield "pieces by voice", ", ".join(f"{name} {n:,}" for name, n in voices.items())
    if heard := totals["round_trip"]:
        worst = [
            f"{v} {of['wer']:.1%} ({of['refused']:,} of {of['pieces']:,} left out)"
            for v, of in list(heard.items())[:SHOWN]
        ]
        yield "word errors of a listener, by voice, the worst first", ", ".join(worst)


def sources(totals: dict[str, Any]) -> str:
    """Where the texts come from, and under which licence each."""
    licences = totals["licences"]
    lines = [
        f"- {name}: {n:,} samples, licence {licences.get(name) or 'not stated'}"
        for name, n in totals["sources"].items()
    ]
    return "\n".join(["All speech is synthetic. The texts are from:", "", *lines])


def changes(totals: dict[str, Any]) -> str:
    """What was left out when it was spoken, and before, when the text was chosen."""
    lines = []
    for what, words in (("rejected", "could not be spoken"), ("filtered", "were left out")):
        if kinds := totals[what]:
            listed = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))
            lines.append(f"- {sum(kinds.values()):,} samples {words}: {listed}.")
    if totals["split"]:
        lines.append(
            f"- {totals['split']:,} texts were too long for one breath and are spoken in "
            f"{totals['pieces']:,} pieces, cut between sentences and tied together by `parent` and "
            "`part`; each has its own text. Nothing is cropped."
        )
    for folder, steps in totals["curation"].items():
        lines += ["", f"The text, `{folder}`, was chosen in these steps:", ""]
        for step in steps:
            dropped = ", ".join(f"{n:,} {why}" for why, n in step["dropped"].items())
            changed = ", ".join(f"{n:,} {what}" for what, n in step["rewritten"].items())
            said = [
                f"dropped {dropped}" if dropped else "",
                f"rewrote {changed}" if changed else "",
            ]
            told = "; ".join(filter(None, said)) or "changed nothing"
            lines.append(f"- {step['step']}: {told}; {step['kept']:,} rows left")
    return "\n".join(lines).strip() or "Every planned sample is there, each whole."


def filters(config: dict[str, Any]) -> str:
    """What was done to the sound, and what a listener had to understand."""
    lines = [
        f"- `{step['_component_']}`: "
        + (", ".join(f"{k} {v}" for k, v in step.items() if k != "_component_") or "as it comes")
        for step in config["augmentation"]
    ]
    said = ["Augmentation, recorded for each row in `extra`:", "", *lines] if lines else []
    if trip := config["round_trip"]:
        listener, most = trip["listener"]["_component_"], trip.get("max_wer", 0.3)
        told = f"Left out is what a listener (`{listener}`) gets more than {most:.0%} wrong of."
        said += ["", told]
    return "\n".join(said).strip() or "The sound is as the engine made it."

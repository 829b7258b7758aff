"""Instruction text: where it comes from, and its curation."""

COMPONENTS = {  # name in YAML, below speechfuse.texts: module and class
    "Alpaca": "sources.Alpaca",
    "Columns": "sources.Columns",
    "Messages": "sources.Messages",
    "answers": "curation.answers.Answers",
    "duplicates": "curation.duplicates.Duplicates",
    "language": "curation.language.Language",
    "length": "curation.length.Length",
    "overlap": "curation.overlap.Overlap",
    "speakable": "curation.speakable.Speakable",
    "turns": "curation.turns.Turns",
}

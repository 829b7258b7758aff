"""Where the text of instructions comes from, and what of it is kept (curation/)."""

COMPONENTS = {  # name in YAML, below speechfuse.texts: where it stands
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

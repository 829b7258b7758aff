"""What is kept of instruction text. These are the names that YAML uses:
speechfuse.curation.speakable, ..."""

from speechfuse.curation.answers import Answers as answers
from speechfuse.curation.duplicates import Duplicates as duplicates
from speechfuse.curation.language import Language as language
from speechfuse.curation.length import Length as length
from speechfuse.curation.overlap import Overlap as overlap
from speechfuse.curation.speakable import Speakable as speakable
from speechfuse.curation.step import Dropped as Dropped
from speechfuse.curation.turns import Turns as turns

__all__ = [
    "Dropped", "answers", "duplicates", "language", "length", "overlap", "speakable", "turns",
]  # fmt: skip

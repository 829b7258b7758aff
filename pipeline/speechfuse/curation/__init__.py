"""What is kept of instruction text. These are the names that YAML uses:
speechfuse.curation.length, ..."""

from speechfuse.curation.length import Length as length
from speechfuse.curation.step import Dropped as Dropped

__all__ = ["Dropped", "length"]

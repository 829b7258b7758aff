"""Where speech comes from. These are the names that YAML uses: speechfuse.corpora.folder, ..."""

from speechfuse.corpora.clip import Clip as Clip
from speechfuse.corpora.clip import Reject as Reject
from speechfuse.corpora.files import Folder as folder
from speechfuse.corpora.spoken import Synthetic as synthetic

__all__ = ["Clip", "Reject", "folder", "synthetic"]

"""Where speech comes from. These are the names that YAML uses: speechfuse.corpora.folder, ..."""

from speechfuse.corpora.clip import Clip as Clip
from speechfuse.corpora.clip import Reject as Reject
from speechfuse.corpora.files import Folder as folder
from speechfuse.corpora.manifests import Nemo as nemo
from speechfuse.corpora.openslr import Mls as mls
from speechfuse.corpora.spoken import Synthetic as synthetic
from speechfuse.corpora.tables import Hub as hub
from speechfuse.corpora.tables import Parquet as parquet
from speechfuse.corpora.tars import WebDataset as webdataset

__all__ = [
    "Clip", "Reject", "folder", "hub", "mls", "nemo", "parquet", "synthetic", "webdataset",
]  # fmt: skip

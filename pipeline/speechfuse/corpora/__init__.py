"""Corpora: where recordings come from. clip.py describes the interface of a corpus."""

COMPONENTS = {  # name in YAML, below speechfuse.corpora: module and class
    "disturbed": "disturbed.Disturbed",
    "folder": "folder.Folder",
    "hub": "hub_dataset.Hub",
    "mls": "mls.Mls",
    "nemo": "nemo.Nemo",
    "parquet": "parquet.Parquet",
    "sessions": "sessions.Sessions",
    "synthetic": "synthetic.Synthetic",
    "webdataset": "webdataset.WebDataset",
}

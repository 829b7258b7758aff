"""Where recordings come from; speechfuse.corpora.clip says what a corpus must have."""

COMPONENTS = {  # name in YAML, below speechfuse.corpora: where it stands
    "folder": "folder.Folder",
    "hub": "hub_dataset.Hub",
    "mls": "mls.Mls",
    "nemo": "nemo.Nemo",
    "parquet": "parquet.Parquet",
    "synthetic": "synthetic.Synthetic",
    "webdataset": "webdataset.WebDataset",
}

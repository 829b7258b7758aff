"""Jobs: `python -m stages.<job> config.yaml key=value ...`. Each reads its configuration, calls the
library, writes one artifact."""

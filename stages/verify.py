"""Check that a finished artifact is what its manifest says.

    python -m stages.verify path=out/data/speech_train

In: any complete artifact, or owner/name@revision on the Hub. Out: a line for each group of checks,
then every fault in a sentence of its own, with exit status 2. Of every artifact the files are
checked against their sha256; of a dataset also shards, rows, rejects, totals and the frozen plan,
all counted anew. A batch of rows is in memory at a time, and 8 bytes for each row.
"""

from dataclasses import dataclass, field

from speechfuse import artifact, config
from speechfuse.hub import data as hub_data
from speechfuse.rows.verification import (
    Findings,
    _is_shard,
    check_dataset,
    check_files,
    check_manifest,
)


@dataclass
class Verify:
    path: str = field(metadata={"help": "folder of the artifact, or owner/name@revision"})


def main(job: Verify) -> None:
    folder = hub_data.local(job.path)
    manifest, report = artifact.manifest_of(folder), Findings()
    check_manifest(folder, manifest, report)
    paths = check_files(folder, manifest["outputs"], report)
    said = f"{len(manifest['outputs']):,} files"
    if any(map(_is_shard, manifest["outputs"])):
        counted = check_dataset(folder, paths, manifest, report)
        hours = f"{counted.seconds / 3600:.2f} h"
        said += f", {counted.rows:,} rows, {counted.codes:,} codes, {hours} of speech"
    faults = report.faults()
    for fault in faults:
        print(f"FAULT     {fault}")
    if faults:
        raise ValueError(
            f"{job.path} is not what its manifest says; faults, listed above: {len(faults)}"
        )
    print(f"verified: {job.path}: {said}")


if __name__ == "__main__":
    config.main(main, Verify, __doc__, ("path",))

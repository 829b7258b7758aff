"""Check that a finished artifact is what its manifest says.

    python -m stages.verify path=out/data/speech_train

In: any complete artifact, or owner/name@revision on the Hub. Out: a line for each group of checks,
then every fault in a sentence of its own, with exit status 2. Every file is checked against its
sha256; of a dataset every row is read: ids, and codes against the codebook. A batch of rows is in
memory at a time, and 8 bytes for each row.
"""

from dataclasses import dataclass

from speechfuse import config
from speechfuse.config import key
from speechfuse.hub import data as hub_data
from speechfuse.rows import verification


@dataclass
class Verify:
    path: str = key("folder of the artifact, or owner/name@revision")


def main(job: Verify) -> None:
    faults: list[str] = []
    for group, checked, its_faults in verification.checks(hub_data.local(job.path)):
        count = f"; faults: {len(its_faults)}" if its_faults else ""
        print(f"{group:9} {checked}{count}", flush=True)
        faults += its_faults
    for fault in faults:
        print(f"FAULT     {fault}")
    if faults:
        raise ValueError(
            f"{job.path} is not what its manifest says; faults, listed above: {len(faults)}"
        )
    print(f"verified: {job.path}: {checked}")


if __name__ == "__main__":
    config.main(main, Verify, __doc__, ("path",))

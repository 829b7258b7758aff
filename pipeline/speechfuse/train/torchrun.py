"""torchrun for stages.train: it ends like every other job.

    python -m speechfuse.train.torchrun --nproc-per-node=2 -m stages.train RECIPE.yaml

In: torchrun's arguments. Out: exit status 130 after Ctrl-C, 143 after SIGTERM, and that of the
first rank that failed, which has said why; torchrun alone would add its own traceback.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from speechfuse import failures

if __name__ == "__main__":
    failures.prepare()
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != 2:  # 2: the rank has printed a sentence
            raise
        sys.exit(2)

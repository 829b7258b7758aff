"""speechfuse: teach a text language model to understand speech, by discrete sound tokens.

The library: the only package that is imported and the only one in the wheel. Jobs live in stages/,
runs are stated in recipes/.
"""

import logging
import os

# torchao 0.15 warns about kernels that it cannot load beside this torch and that nothing here uses
logging.getLogger("torchao").setLevel(logging.ERROR)
# which font it takes in place of one that is not installed is nothing to correct
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

# its advice is on settings not ours to change; read when transformers is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# On a busy machine idle threads must not spin for long, and on a quiet one they must not be woken
# for each operation. Steps of the demo's stage 2 a second on two cores, quiet and beside one busy
# core: 12.8 and 0.7 untouched (300,000 spins), 13.0 and 3.7 with 10,000, 12.2 and 4.4 so, 8.8 and
# 5.8 with 1,000. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__version__ = "0.1.0"

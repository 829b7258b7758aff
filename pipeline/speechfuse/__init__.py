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

# On a busy machine idle threads must not spin for long: decoding took 6 times as long. A few spins
# stay, so that a quiet machine waits for no thread to wake. Steps of the demo a second, two cores,
# quiet and beside one busy core: 8.3 and 2.6 untouched, 7.8 and 4.0 so, 6.5 and 4.7 without spins.
# Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"

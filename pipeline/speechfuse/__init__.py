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

# on a busy machine idle threads must not spin: decoding took 6 times as long, training 4 to 7
# times; read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

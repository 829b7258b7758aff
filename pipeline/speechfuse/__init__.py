"""speechfuse: teach a text language model to understand speech, by discrete sound tokens.

The library: the only package that is imported and the only one in the wheel. Jobs live in stages/,
runs are stated in recipes/.
"""

import logging
import os

# torchao 0.15 warns about kernels that it cannot load beside this torch and that nothing here uses
logging.getLogger("torchao").setLevel(logging.ERROR)

# its advice is on settings not ours to change; read when transformers is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.1.0"

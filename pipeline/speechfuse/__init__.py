"""speechfuse: teach a text language model to understand speech, by discrete sound tokens.

The library: the only package that is imported and the only one in the wheel. Jobs live in stages/,
runs are stated in recipes/.
"""

import logging

# torchao 0.15 warns about kernels that it cannot load beside this torch and that nothing here uses
logging.getLogger("torchao").setLevel(logging.ERROR)

__version__ = "0.1.0"

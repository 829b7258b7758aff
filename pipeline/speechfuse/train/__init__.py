"""Training: the loop of the language model, its parts, and the training of a quantizer."""

import logging

# torchao 0.15 warns about kernels that it cannot load beside this torch and that nothing here uses
logging.getLogger("torchao").setLevel(logging.ERROR)

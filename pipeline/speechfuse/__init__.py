"""speechfuse: teach a text language model to understand speech, by discrete sound tokens.

The library: the only package that is imported and the only one in the wheel. Jobs live in stages/,
runs are stated in recipes/.
"""

__version__ = "0.1.0"

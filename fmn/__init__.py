"""Merge Transformers fine-tuned from one base on different tasks into one multi-task model.

The weights are the Fisher information of mask nodes (Thennal D K, Nathan, Suchithra,
LREC-COLING 2024).
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fmn")
except PackageNotFoundError:  # a folder of code that is not installed
    __version__ = "0+unknown"

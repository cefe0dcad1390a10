"""Merge Transformers fine-tuned from one base on different tasks into one multi-task model.

The weights are the Fisher information of mask nodes (Thennal D K, Nathan, Suchithra,
LREC-COLING 2024).
"""

__version__ = "0.1.0"

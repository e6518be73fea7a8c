"""Train a language model for capability and for alignment, every stage, from raw text to chat."""

__version__ = "0.1.0"

"""A long-lived worker that reranks documents with a cross-encoder over newline-delimited JSON on stdin and stdout."""

__version__ = "0.1.0"

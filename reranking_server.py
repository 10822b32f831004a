#!/usr/bin/env python3
"""The worker's entry point: `python reranking_server.py [--model NAME_OR_PATH] [--batch-size N] [...]` serves on stdin and stdout."""

import sys

from reranker_worker.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])

"""`python -m reranker_worker COMMAND`: see `cli`."""

import sys

from reranker_worker.cli import main

if __name__ == "__main__":
    main(sys.argv[1:])

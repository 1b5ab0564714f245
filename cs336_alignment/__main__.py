"""`python -m cs336_alignment VERB ...`: what course.py hands every verb to."""

import sys

from cs336_alignment.cli import main

if __name__ == "__main__":
    sys.exit(main())

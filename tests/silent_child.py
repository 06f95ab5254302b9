"""A program that reads and never answers, for tests of deadlines."""

import sys

for _ in sys.stdin:
    pass

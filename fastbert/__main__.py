"""`python -m fastbert` is the same as `fastbert`."""

from fastbert.cli import main

main()

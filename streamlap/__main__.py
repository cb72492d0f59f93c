"""`python -m streamlap`, as `streamlap`."""

from streamlap.cli import main

main()

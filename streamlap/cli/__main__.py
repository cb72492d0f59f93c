"""`python -m streamlap.cli`, as `streamlap`."""

from streamlap.cli import main

main()

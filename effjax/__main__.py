"""`python -m effjax VERB`."""

import sys

from effjax.cli import main

if __name__ == "__main__":
  sys.exit(main.main())

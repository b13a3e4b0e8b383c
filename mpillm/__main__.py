"""`python -m mpillm`."""

import sys

from mpillm.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m dmjd`, alike `dmjd`: what torchrun starts."""

import sys

from dmjd.cli import main

if __name__ == "__main__":
    sys.exit(main())

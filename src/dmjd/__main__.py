"""`python -m dmjd`, the same as `dmjd`: what torchrun starts."""

import os
import sys

from dmjd.cli import main

if __name__ == "__main__":
    code = main()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads of a group of processes that was left by an error may abort this one on its way out, and its code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

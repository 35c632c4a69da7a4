"""`python -m dmjd`, the same as `dmjd`; torchrun starts this module."""

import os
import sys

from dmjd.cli import main

if __name__ == "__main__":
    code = main()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # After an error, threads of the process group may abort the interpreter at exit and so replace its exit code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

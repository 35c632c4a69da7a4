"""Runs several command lines one after the other: `[torchrun ...] verbs.py LINES.json`."""

import json
import sys
from pathlib import Path

from dmjd.cli import main

if __name__ == "__main__":
    for line in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(line):
            sys.exit(code)

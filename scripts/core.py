"""Leads to the package `core` where a program is started by its path, from any folder: python PATH/scripts/train.py

Python then looks for packages beside the program, and so here, first. It goes on in the folder above.
"""

import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:] = [str(here.parent), *(place for place in sys.path if Path(place).resolve() != here)]
del sys.modules["core"]

import core  # noqa: E402, F401  which takes the place of this module

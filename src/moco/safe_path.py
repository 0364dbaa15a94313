"""Take the current folder off the path of modules. Importing this does it; the command line imports it first.

`python -m` and an empty part of PYTHONPATH put the folder there. A random.py of the user's would then be imported in
place of Python's, here or in any library. Nothing is imported for it but what Python itself has at its start.
"""

from __future__ import annotations

import os
import sys


def without_current_folder(path: list[str]) -> list[str]:
    """Return the path of modules without the current folder, unless this package itself lies there."""
    # pathlib would import much.
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
    here = os.path.realpath(os.curdir)
    return [folder for folder in path if os.path.realpath(folder) != here or here == package]


sys.path[:] = without_current_folder(sys.path)

"""A world that breaks: what MOCO_WORLD names is wrong in every Python process whose PYTHONPATH begins with this folder.
Each time it has been wrong is a byte in the file that MOCO_WORLD_SEEN names."""

import os
import time
from pathlib import Path

WORLD, SEEN = os.environ.get("MOCO_WORLD", ""), os.environ.get("MOCO_WORLD_SEEN", "")


def seen():
    with Path(SEEN).open("ab") as file:
        file.write(b".")


if WORLD == "slow-rename":

    def slowly(action):
        def act(*arguments, **options):
            seen()
            time.sleep(0.3)
            return action(*arguments, **options)

        return act

    os.rename, os.replace = slowly(os.rename), slowly(os.replace)

if WORLD == "clock":
    real, began, turns = time.time, time.monotonic(), [0]

    def jumping():
        """A day back and a day ahead of the real time, changing every tenth of a second."""
        turn = int((time.monotonic() - began) * 10) % 2
        if turn != turns[-1]:
            turns.append(turn)
            seen()
        return real() + (86400 if turn else -86400)

    time.time = jumping

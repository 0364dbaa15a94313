"""A world that breaks: what MOCO_WORLD names is wrong in every Python process whose PYTHONPATH holds this folder."""

import os
import time

WORLD = os.environ.get("MOCO_WORLD", "")

if WORLD == "slow-rename":
    rename, replace = os.rename, os.replace

    def slowly(action):
        def act(*arguments, **options):
            time.sleep(0.3)
            return action(*arguments, **options)

        return act

    os.rename, os.replace = slowly(rename), slowly(replace)

if WORLD == "clock":
    real, began = time.time, time.monotonic()

    def jumping():
        """A day back and a day ahead of the real time, changing every tenth of a second."""
        return real() + (86400 if int((time.monotonic() - began) * 10) % 2 else -86400)

    time.time = jumping

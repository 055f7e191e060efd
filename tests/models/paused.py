"""`python -m tests.models.paused N ...` is `python -m dmquant ...` that waits for its end when N batches are made."""

import runpy
import sys
import time

from dmquant.evaluation import generate

left = int(sys.argv.pop(1))
made = generate._call


def waiting(*args):
    global left
    if not left:
        time.sleep(3600)
    left -= 1
    return made(*args)


generate._call = waiting
runpy.run_module("dmquant", run_name="__main__", alter_sys=True)

"""Runs `python -m MODULE ARGS...`, and ends at once when the launcher that started it is gone.

Used as a script: `python leash.py MODULE ARGS...` with a pipe on standard input. The launcher holds
the other end and never writes; end of file means it was stopped or killed, however abruptly. So no
pip goes on writing into an environment that the next launcher is about to build again.
"""

import os
import runpy
import sys
import threading


def end_with_launcher(descriptor: int) -> None:
    while os.read(descriptor, 4096):
        pass
    os._exit(75)


if __name__ == "__main__":
    held = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    threading.Thread(target=end_with_launcher, args=(held,), daemon=True).start()
    module, sys.argv = sys.argv[1], sys.argv[1:]
    # Neither this folder nor the current one may offer modules to the one being run.
    del sys.path[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

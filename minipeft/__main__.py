"""The command `minipeft`, also `python -m minipeft`."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends the process, silently, until `cli.main` takes it

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m molora_cli`, the form in which launchers start the command line."""

import os
import sys

from molora_cli import main

code = main()
sys.stdout.flush()
sys.stderr.flush()
if code and "RANK" in os.environ:
    # At once, before the others repeat what was wrong: taking a group of processes down in good order takes seconds.
    os._exit(code)
sys.exit(code)

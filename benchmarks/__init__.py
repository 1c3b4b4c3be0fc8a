"""Benchmarks of molora on one machine, one command each. See `README.md` beside this file."""

import os

# The memory profiler would announce every start and stop; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

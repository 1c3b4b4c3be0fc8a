"""`molora schema`: the JSON Schema of a run file."""

from __future__ import annotations

import json
import sys

from molora.runfile import json_schema


def run() -> int:
    """Print the schema."""
    json.dump(json_schema(), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
    return 0

"""Ready-made run files, importable as `molora.configs`: `quickstart.yaml` and friends."""

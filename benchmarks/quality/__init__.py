"""Quality of mixtures against plain LoRA: one command, `python -m benchmarks.quality`. See `benchmarks/README.md`."""

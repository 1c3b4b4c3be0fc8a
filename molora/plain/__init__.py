"""The plain LoRA that a mixture is, where its mixing weights are fixed, or that comes nearest to it on data."""

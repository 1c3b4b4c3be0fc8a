"""Mixtures on servers of LoRAs, without a server: packed matrices, the gate and its tables, what cannot be served.

The plug-in for vLLM lies in `serving/`, outside this package, and loads from here what it needs.
"""

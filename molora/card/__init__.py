"""Model cards: what a person on the hub reads about an adapter, written whenever one is saved.

`front` and `place` know nothing of adapters. `job` gathers what `text` says, and reads what reports read; import it
inside a function where that would be a circle.
"""

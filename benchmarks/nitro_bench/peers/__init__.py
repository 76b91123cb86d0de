"""Peers: other ways to draw a checkpoint. One adapter a file; `catalogue` lists them; `serve` runs one in its own interpreter.

Nothing may be imported here: a peer's interpreter, which has neither nitro_rt nor its dependencies, loads this package too.
"""

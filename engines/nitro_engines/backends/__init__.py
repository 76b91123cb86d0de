"""Compilers from ONNX to an engine, by name. A backend's library is imported when it is asked for."""

from nitro_engines.backends.base import Backend, available_backends, load_backend

__all__ = ["Backend", "available_backends", "load_backend"]

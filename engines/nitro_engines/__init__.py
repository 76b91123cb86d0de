"""From ONNX graphs to engines: backends, keys, the cache, and bundles published whole or not at all.

Importing this loads no backend and no torch; a backend's library is imported when it is asked for.
"""

from nitro_engines.build import build
from nitro_engines.bundle import BuildResult, build_bundle
from nitro_engines.cache import EngineCache
from nitro_engines.keys import key_of
from nitro_engines.models import ModelSource, resolve_model
from nitro_engines.plan import BuildPlan, plan
from nitro_engines.request import BuildRequest

__all__ = [
    "BuildPlan",
    "BuildRequest",
    "BuildResult",
    "EngineCache",
    "ModelSource",
    "build",
    "build_bundle",
    "key_of",
    "plan",
    "resolve_model",
]

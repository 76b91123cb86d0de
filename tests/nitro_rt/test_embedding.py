"""The page for who embeds nitro-rt, and its example: their code runs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nitro_rt import ConfigError, DeviceLost, QueueFull

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")
BUNDLE = "engines/nitro-emoji-1step"


class HTTPException(Exception):
    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)


class FastAPI:
    """As much of it as the page uses."""

    def __init__(self, *, lifespan: Any) -> None:
        self.lifespan, self.state, self.routes = lifespan, ModuleType("state"), {}

    def get(self, path: str) -> Any:
        return lambda function: self.routes.setdefault(path, function)


def run_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All Python of the page, in order, in one namespace."""
    fastapi: Any = ModuleType("fastapi")
    fastapi.FastAPI, fastapi.HTTPException = FastAPI, HTTPException
    fastapi.Response = lambda content, media_type: (content, media_type)
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    namespace: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block.replace(BUNDLE, str(folder)), "docs/embedding.md", "exec"), namespace)
    return namespace


def test_the_code_of_the_page_runs(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = run_page(bundle_folder, monkeypatch)
    assert len(page["results"]) == 3 and page["pixels"].shape == (1, 32, 32, 3) and Path("apple.png").is_file()

    async def serve() -> None:
        app = page["app"]
        async with app.lifespan(app):
            content, media_type = await app.routes["/image"]("a red apple", seed=3)
            assert content.startswith(b"\x89PNG") and media_type == "image/png"
            for error, status in ((QueueFull("full"), 503), (ConfigError("wrong"), 422), (DeviceLost("lost"), 503)):

                async def fail(*args: Any, error: Exception = error, **kwargs: Any) -> None:
                    raise error

                with monkeypatch.context() as patch, pytest.raises(HTTPException) as caught:
                    patch.setattr(app.state.pipe, "submit_async", fail)
                    await app.routes["/image"]("a red apple")
                assert caught.value.args[0] == status

    asyncio.run(serve())


def test_the_example_runs(bundle_folder: Path) -> None:
    command = [sys.executable, "examples/many_callers.py", str(bundle_folder), "--callers", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+): 5 images in", done.stdout, re.MULTILINE) == ["threads", "futures", "tasks"]

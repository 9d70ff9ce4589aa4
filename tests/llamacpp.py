"""llama.cpp itself, from its wheel: the peer that reads what `export` writes."""

from __future__ import annotations

import secrets
from pathlib import Path

import httpx
import xllamacpp


class LlamaCpp:
    """A model in llama.cpp's server, on the loopback interface and behind a key."""

    def __init__(self, path: Path):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = 512, 1
        settings.cpuparams.n_threads = 2
        settings.warmup, settings.verbosity = False, -1
        key = secrets.token_hex()
        settings.api_keys = [key]
        self._server = xllamacpp.Server(settings)
        self._client = httpx.Client(
            base_url=self._server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
            trust_env=False,
        )

    def _ask(self, path: str, **question) -> dict:
        answer = self._client.post(path, json=question)
        answer.raise_for_status()
        return answer.json()

    def tokens(self, text: str) -> list[int]:
        """Return the ids of `text`, BOS included, and marks such as `</s>` taken as letters."""
        asked = {"content": text, "add_special": True, "parse_special": False}
        return self._ask("/tokenize", **asked)["tokens"]

    def greedy(self, prompt_ids: list[int], count: int = 24) -> list[int]:
        """Return the next ids, at most `count`, each the most probable one."""
        asked = {"prompt": prompt_ids, "n_predict": count, "temperature": 0}
        return self._ask("/completion", **asked, return_tokens=True, cache_prompt=False)["tokens"]

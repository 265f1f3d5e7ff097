"""llama.cpp in an environment and a process of its own; see `peer_llama.py` for what it does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_parts.asked import Took
from transformers import PreTrainedModel

SHORTEST_RUN = 256
"""Tokens that `--cache-reuse` is set to in llama.cpp's own presets."""


class Llama:
    """A process that answers by llama.cpp, with one or more kinds of weights."""

    def __init__(
        self, python: str, network: PreTrainedModel, folder: Path, kinds: Sequence[str], num_tokens: int
    ) -> None:
        """Write the weights for it and start it.

        Args:
            python: of an environment with llama-cpp-python, gguf and safetensors.
            network: in float32.
            folder: for its files, empty.
            kinds: of weights, see `peer_gguf.KINDS`.
            num_tokens: the longest prompt and answer together.
        """
        network.save_pretrained(folder / "model", max_shard_size="1TB")
        self._log = folder / "llama.log"
        self.kinds = tuple(kinds)
        script = Path(__file__).parent / "peer_llama.py"
        given = [folder / "model", folder, torch.get_num_threads(), num_tokens, *kinds]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(script), *map(str, given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.told = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = "\n".join(self._log.read_text().splitlines()[-8:])
            raise SystemExit(f"llama.cpp's process ended; the last lines of its log:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _do(self, what: str, kind: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "kind": kind, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def forget(self, kind: str) -> None:
        """As after a start."""
        self._do("forget", kind)

    def ask(self, kind: str, prompt: list[int], new_tokens: int, *, shortest_run: int = 0) -> Took:
        """Answer with what is there; `shortest_run` as `--cache-reuse` has it."""
        return Took(**self._do("ask", kind, tokens=prompt, new_tokens=new_tokens, shortest_run=shortest_run))

    def keep(self, kind: str) -> int:
        """Hold the state of the last prompt and answer in memory; its bytes."""
        return int(self._do("keep", kind)["bytes"])

    def save(self, kind: str, path: Path, num_tokens: int) -> int:
        """Write the state of the last prompt's first tokens; the file's bytes."""
        return int(self._do("save", kind, path=str(path), num_tokens=num_tokens)["bytes"])

    def ask_file(self, kind: str, path: Path, prompt: list[int], new_tokens: int) -> Took:
        """Answer from a saved file, with nothing in memory."""
        return Took(**self._do("ask_file", kind, path=str(path), tokens=prompt, new_tokens=new_tokens))

    def logits(self, kind: str, prompt: list[int], path: Path) -> torch.Tensor:
        """Of the prompt's last token."""
        self.forget(kind)
        self._do("logits", kind, tokens=prompt, path=str(path))
        return torch.from_numpy(np.load(path))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

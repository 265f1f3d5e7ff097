"""A decoder and its tokenizer, loaded, proven and named by digests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as logging_of_transformers

from kvrag import backbone
from kvrag.errors import ConfigError, UnsupportedModel
from kvrag.linears import Linears
from kvrag.probe import probe
from kvrag.shapes import Recorder
from kvrag.store.codec import Shape
from kvrag.store.key import Fingerprint, tagged_digest, token_bytes
from kvrag.store.tenants import Tenant
from kvrag.text import Text

READER = "kvrag/reader"

# Entries of a configuration that say where it came from or how it runs, not what the model computes.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
        "id2label",
    }
)


class Model:
    """A decoder whose caches can be re-positioned, with its tokenizer.

    Attributes:
        name: what the user called it.
        network: the transformers model, in evaluation mode.
        text: its tokenizer and chat template.
        specs: each layer's rotation and window, as proven by the probe.
        max_length: longest prompt plus answer, in tokens.
    """

    def __init__(
        self, network: PreTrainedModel, tokenizer: Any, *, name: str = "model", max_length: int | None = None
    ) -> None:
        """Adopt a model that is already loaded and prove its layers.

        Raises:
            UnsupportedModel: its caches cannot be re-positioned exactly; the message says why.
            ConfigError: `max_length` is longer than the model's positions.
        """
        self.name = name
        self.network = network
        network.eval()
        self.text = Text(tokenizer)
        self.max_length = _max_length(network.config.get_text_config(decoder=True), max_length)
        self._forward = backbone.Forward.of(network)
        self._linears = Linears(network)
        try:
            backbone.adopt(network)
            self.specs = probe(network, self._forward, max_length=self.max_length)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{name} ({network.config.model_type}) cannot be used: {error}") from error

    @classmethod
    def load(
        cls,
        name: str | Path = READER,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Model:
        """Load a decoder by folder or hub name; "kvrag/reader" is the small one that comes along.

        Args:
            name: folder or hub name.
            device: "cuda", "cpu", ...; default: the GPU if there is one.
            dtype: "float32", "bfloat16", ... ; "auto" is the checkpoint's own on a GPU and float32 on a CPU.
            max_length: longest prompt plus answer in tokens; default: the model's own limit.
            revision: of a hub model.
            trust_remote_code: run code that comes with the checkpoint.

        Raises:
            ConfigError: no such model here, damaged files, or an impossible device, dtype or length.
            UnsupportedModel: unknown architecture, or one that cannot be re-positioned exactly.
        """
        from kvrag import reader  # noqa: PLC0415 - only this name needs it

        source = str(reader.path()) if str(name) == READER else str(name)
        if _is_path(source) and not Path(source).exists():
            raise ConfigError(
                f"model {source!r} could not be loaded: there is no such folder. "
                "Give a folder with config.json and weights"
            )
        where = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = _dtype(dtype, where)
        common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            AutoConfig.from_pretrained(source, **common)  # tells an unknown architecture from damaged files
        except (ValueError, KeyError) as error:
            raise UnsupportedModel(
                f"model {str(name)!r} is not a decoder that transformers knows: {_first_line(error)}"
            ) from error
        except (OSError, ImportError) as error:
            raise ConfigError(
                f"model {str(name)!r} could not be loaded: {_first_line(error)} "
                "Give a folder with config.json and weights, or a hub name where a hub can be reached."
            ) from error
        try:
            network: Any = AutoModelForCausalLM.from_pretrained(source, dtype=chosen, **common)
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
        except ValueError as error:
            if "AutoModelForCausalLM" in str(error):
                raise UnsupportedModel(
                    f"model {str(name)!r} is not a decoder that transformers knows: {_first_line(error)}"
                ) from error
            raise _unloadable(name, error) from error
        except Exception as error:  # a damaged file raises whatever its parser raises
            raise _unloadable(name, error) from error
        return cls(network.to(where), tokenizer, name=str(name), max_length=max_length)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.network.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights, keys and values."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.specs)

    def run(
        self,
        ids: torch.Tensor,
        reading: backbone.Reading,
        *,
        logits_to_keep: int = 1,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One forward pass at position zero; see `kvrag.backbone.run`."""
        positions = torch.zeros_like(ids)
        with self._linears.lent(ids.numel()):
            return backbone.run(
                self.network, self._forward, ids, positions, reading, logits_to_keep=logits_to_keep, rows=rows
            )

    def fingerprint(
        self, prefix: Sequence[int] = (), *, codec: str = "raw", tenant: Tenant | None = None
    ) -> Fingerprint:
        """What entries encoded behind `prefix` (tokens) and written by `codec` for `tenant` depend on."""
        key = tenant.key if tenant else b""
        return Fingerprint(
            model=self._weights_digest,
            tokenizer=self.text.digest,
            rope=self._rope_digest,
            dtype=str(self.dtype).removeprefix("torch."),
            # Keyed, too: who knows a prompt or a neighbour shall not recognise it in a manifest.
            prefix=tagged_digest({"prefix": token_bytes(tuple(prefix))}, key),
            codec=codec,
            tenant=tenant.label if tenant else "",
            rotations=tuple(spec.rotation for spec in self.specs),
            tenant_key=key,
        )

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """(K, D, Dv) of every layer, noted while a token passes through."""
        recorder = Recorder()
        with torch.inference_mode():
            self.run(torch.zeros(1, 1, dtype=torch.long, device=self.device), recorder)
        return tuple(shape for _, shape in sorted(recorder.layers.items()))

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values of all layers."""
        return self.dtype.itemsize * sum(heads * (key + value) for heads, key, value in self.shapes)

    @cached_property
    def _weights_digest(self) -> str:
        tensors = sorted(self.network.state_dict().items())
        with ThreadPoolExecutor(max_workers=4) as pool:  # the hash releases the interpreter lock
            digests = pool.map(_tensor_digest, (tensor for _, tensor in tensors))
        fields: dict[str, str | int | bytes] = {
            f"tensor:{name}": digest for (name, _), digest in zip(tensors, digests, strict=True)
        }
        config = {k: v for k, v in self.network.config.to_dict().items() if k not in _VOLATILE}
        fields["config"] = json.dumps(config, sort_keys=True, default=str)
        return tagged_digest(fields)

    @cached_property
    def _rope_digest(self) -> str:
        return tagged_digest({"layers": json.dumps([asdict(spec) for spec in self.specs], sort_keys=True)})


def quiet() -> None:
    """Silence transformers' progress bars and advice; for programs that show their own."""
    logging_of_transformers.set_verbosity_error()
    logging_of_transformers.disable_progress_bar()


def _tensor_digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return f"{tuple(tensor.shape)} {tensor.dtype} {xxhash.xxh3_128_hexdigest(raw)}"


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto" if device.type != "cpu" else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is {dtype!r}; expected auto, float32, bfloat16 or float16")
    return found


def _is_path(name: str) -> bool:
    """Whether this can only be a folder: names on a hub are `name` or `owner/name`."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1


def _unloadable(name: str | Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"model {str(name)!r} could not be loaded, its files may be damaged: {_first_line(error)}"
    )


def _device(device: str | torch.device) -> torch.device:
    """The device, if there is such a one here."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # one for each way of not being there
        raise ConfigError(
            f"device is {str(device)!r}; this machine and this torch offer {_devices()}"
        ) from error
    if found.type == "meta":
        raise ConfigError(f"device is {str(device)!r}, which computes nothing; expected {_devices()}")
    return found


def _devices() -> str:
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(["cpu", *found])


def _max_length(config: Any, wanted: int | None) -> int:
    limit = max(0, getattr(config, "max_position_embeddings", None) or 0)  # XLNet says -1 for "no limit"
    if wanted is None:
        return limit or 4096
    if wanted < 1 or (limit and wanted > limit):
        raise ConfigError(f"max_length is {wanted}; this model has positions 1 to {limit}")
    return wanted


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).split("\n", 1)[0][:300]
    return line if line.endswith(".") else f"{line}."

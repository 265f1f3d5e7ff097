"""The rows of a memory: keys and values in slots, and what is written over on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvrag.memory.base import Moves, Run
from kvrag.rotary import LayerSpec
from kvrag.segments import KV, LayerKV, Segment
from kvrag_kernels import Moving, Places, Spin, move_rows

Shape = tuple[int, int, int]
_LEAST = 64


@dataclass(slots=True)
class LayerRows:
    """One layer's slots.

    Attributes:
        keys: [K, n, D], each rotated at the number of its slot.
        values: [K, n, Dv].
        raw: [K, n, D], the keys as they were before any rotation; None where a rotated key can be turned
            again without loss (float32 and wider), or where nothing is rotated.
    """

    keys: torch.Tensor
    values: torch.Tensor
    raw: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them."""
        return (self.keys, self.values) if self.raw is None else (self.keys, self.values, self.raw)


@dataclass(frozen=True, slots=True)
class _Image:
    """What some slots of all layers held."""

    slots: torch.Tensor
    layers: tuple[tuple[torch.Tensor, ...], ...]

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in layer)


@dataclass(slots=True)
class Journal:
    """What slots held before they were written over, oldest change first.

    Attributes:
        images: each slot comes once at most: what it held first is what it goes back to.
        seen: [n], bool: slots that are in it.
    """

    images: list[_Image] = field(default_factory=list)
    seen: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all images."""
        return sum(image.num_bytes for image in self.images)


class MemoryRows:
    """Keys and values of one memory in all layers.

    Buffers grow as slots are used, by doubling, up to the capacity that a policy has; so a short talk under a
    large budget takes little.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        shapes: Sequence[Shape],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """An empty memory.

        Args:
            specs: of the model's layers.
            shapes: (K, D, Dv) of every layer.
            dtype: of keys and values.
            device: where they lie.
        """
        self.specs, self.shapes = tuple(specs), tuple(shapes)
        self.dtype, self.device = dtype, device
        self.layers = [self._empty(spec, shape) for spec, shape in zip(specs, shapes, strict=True)]
        self._spins = {spec: _spin(spec) for spec in dict.fromkeys(self.specs)}
        self._written = torch.zeros(0, dtype=torch.bool, device=device)
        self._journal: Journal | None = None

    def _empty(self, spec: LayerSpec, shape: Shape) -> LayerRows:
        heads, key, value = shape
        keys = torch.empty((heads, 0, key), dtype=self.dtype, device=self.device)
        values = torch.empty((heads, 0, value), dtype=self.dtype, device=self.device)
        keeps_raw = spec.rotation is not None and self.dtype.itemsize < 4
        return LayerRows(keys, values, torch.empty_like(keys) if keeps_raw else None)

    @property
    def num_slots(self) -> int:
        """Slots that there is room for now."""
        return len(self._written)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, the journal that is being written left out."""
        return sum(t.nbytes for layer in self.layers for t in layer.tensors)

    @torch.inference_mode()
    def apply(
        self, moves: Moves, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], *, capacity: int
    ) -> None:
        """Write what a stride changes: new rows, and old ones that go to another slot.

        Every source is read before any slot is written.

        Args:
            moves: from the policy.
            keys: the stride's keys of each layer, [K, q, D], not rotated.
            values: the stride's values of each layer, [K, q, Dv].
            capacity: slots that the policy has by now.
        """
        slots = moves.slots.to(self.device)
        if not len(slots):
            return
        self._grow(int(slots.max()) + 1, capacity)
        self._note(slots)
        places = Places(slots, moves.sources.to(self.device), moves.num_before)
        move_rows([x for i in range(len(self.layers)) for x in self._moving(i, keys[i], values[i])], places)
        self._written[slots] = True

    def _moving(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> list[Moving]:
        """What moves in one layer; keys are turned from before any rotation where they are kept like that."""
        spin, rows = self._spins[self.specs[layer]], self.layers[layer]
        moved = [Moving(layer, rows.values, rows.values, values)]
        if rows.raw is None:
            return [*moved, Moving(layer, rows.keys, rows.keys, keys, spin, is_turned=True)]
        return [
            *moved,
            Moving(layer, rows.keys, rows.raw, keys, spin),
            Moving(layer, rows.raw, rows.raw, keys),
        ]

    def _grow(self, needed: int, capacity: int) -> None:
        if needed <= self.num_slots:
            return
        size = min(max(needed, 2 * self.num_slots, _LEAST), max(capacity, needed))
        for layer in self.layers:
            layer.keys, layer.values = _longer(layer.keys, size), _longer(layer.values, size)
            layer.raw = None if layer.raw is None else _longer(layer.raw, size)
        written = torch.zeros(size, dtype=torch.bool, device=self.device)
        written[: self.num_slots] = self._written
        self._written = written

    def segments(self, runs: Sequence[Run], offset: int) -> tuple[Segment, ...]:
        """The memory as attention reads it; valid until the next `apply`, `revert` or `load`.

        Args:
            runs: from the policy.
            offset: position of rank 0.
        """
        return tuple(
            Segment(self._view(run), target=offset + run.rank, native=run.slot) for run in runs if run.length
        )

    def _view(self, run: Run) -> KV:
        """Rows of some slots. Heads hold different tokens, so there is no text to name them by."""
        part = slice(run.slot, run.slot + run.length)
        return KV((-1,) * run.length, tuple(LayerKV(x.keys[:, part], x.values[:, part]) for x in self.layers))

    def begin(self) -> Journal:
        """Write down from now on, in a new journal, what is written over."""
        self._journal = Journal()
        return self._journal

    def end(self) -> None:
        """Stop writing down."""
        self._journal = None

    def _note(self, slots: torch.Tensor) -> None:
        """Keep what the slots hold, if they hold anything and are not in the journal yet."""
        journal = self._journal
        if journal is None:
            return
        if journal.seen is None or len(journal.seen) < self.num_slots:
            seen = torch.zeros(self.num_slots, dtype=torch.bool, device=self.device)
            if journal.seen is not None:
                seen[: len(journal.seen)] = journal.seen
            journal.seen = seen
        left = slots[self._written[slots] & ~journal.seen[slots]]
        journal.seen[slots] = True  # what was empty goes back to being empty, whatever lies there
        if len(left):
            journal.images.append(self._image(left))

    def _image(self, slots: torch.Tensor) -> _Image:
        return _Image(slots, tuple(tuple(t[:, slots] for t in x.tensors) for x in self.layers))

    @torch.inference_mode()
    def revert(self, journal: Journal) -> Journal:
        """Bring back what a journal holds; gives what brings the present back in its turn."""
        back = Journal()
        for image in reversed(journal.images):
            back.images.append(self._image(image.slots))
            for layer, held in zip(self.layers, image.layers, strict=True):
                for tensor, rows in zip(layer.tensors, held, strict=True):
                    tensor[:, image.slots] = rows
        return back

    @torch.inference_mode()
    def copy(self) -> MemoryRows:
        """The same rows in memory of their own, without a journal."""
        other = MemoryRows(self.specs, self.shapes, dtype=self.dtype, device=self.device)
        other.layers = [
            LayerRows(x.keys.clone(), x.values.clone(), None if x.raw is None else x.raw.clone())
            for x in self.layers
        ]
        other._written = self._written.clone()
        return other

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name, for a file: views."""
        found = {"written": self._written}
        for i, layer in enumerate(self.layers):
            for name, tensor in zip(("keys", "values", "raw"), layer.tensors, strict=False):
                found[f"{i:03d}.{name}"] = tensor
        return found

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Become what `tensors` gave; takes the tensors over.

        Raises:
            ValueError: they are not those of such a memory.
        """
        mine = self.tensors()
        if set(tensors) != set(mine):
            raise ValueError(f"rows of {len(tensors)} tensors cannot become {len(mine)}")
        size = len(tensors["written"])
        for name, tensor in tensors.items():
            old = mine[name]
            shape = (size,) if old.dim() == 1 else (old.shape[0], size, old.shape[2])
            if tensor.shape != shape or tensor.dtype != old.dtype:
                raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not {shape}")
        for i, layer in enumerate(self.layers):
            layer.keys, layer.values = tensors[f"{i:03d}.keys"], tensors[f"{i:03d}.values"]
            layer.raw = None if layer.raw is None else tensors[f"{i:03d}.raw"]
        self._written = tensors["written"]
        self._journal = None


def images_of(journal: Journal) -> list[tuple[torch.Tensor, ...]]:
    """A journal as tensors, for a file: of each image the slots, then those of layer after layer."""
    return [(image.slots, *(t for layer in image.layers for t in layer)) for image in journal.images]


def journal_of(images: Sequence[Sequence[torch.Tensor]], rows: MemoryRows) -> Journal:
    """What `images_of` gave, as a journal of these rows.

    Raises:
        ValueError: it is not of such rows.
    """
    counts = [len(layer.tensors) for layer in rows.layers]
    found = []
    for slots, *tensors in images:
        if len(tensors) != sum(counts):
            raise ValueError(f"an image has {len(tensors)} tensors, not {sum(counts)}")
        left = iter(tensors)
        found.append(_Image(slots, tuple(tuple(next(left) for _ in range(n)) for n in counts)))
    return Journal(found)


def _spin(spec: LayerSpec) -> Spin | None:
    if spec.rotation is None:
        return None
    rotation = spec.rotation
    exact = torch.tensor(rotation.frequencies, dtype=torch.float32).tolist()  # as `Rotation.turn` has them
    signed = tuple(rotation.sign * frequency for frequency in exact)
    return Spin(signed, rotation.start, rotation.layout == "interleaved")


def _longer(rows: torch.Tensor, size: int) -> torch.Tensor:
    found = rows.new_zeros((rows.shape[0], size, rows.shape[2]))
    found[:, : rows.shape[1]] = rows
    return found

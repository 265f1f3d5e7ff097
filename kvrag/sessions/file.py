"""A saved conversation: one safetensors file that is whole or not there. Specified in docs/sessions.md."""

from __future__ import annotations

import json
import uuid
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

from kvrag.errors import ConfigError, SessionDamaged
from kvrag.memory.base import MemoryPolicy
from kvrag.memory.policies import POLICIES
from kvrag.memory.rows import images_of, journal_of
from kvrag.model import Model
from kvrag.segments import KV, LayerKV, Segment, SegmentTable
from kvrag.sessions import container, logs
from kvrag.sessions.container import Tensors
from kvrag.sessions.digest import TextDigest
from kvrag.sessions.pinned import Opening, Pinned, with_rows
from kvrag.sessions.talk import Snapshot, Talk
from kvrag.sessions.vault import PLAIN, SUFFIX, Vault
from kvrag.store.files import PARTIAL, commit, make_folder, remove, write_error, write_partial


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file holds, every byte of it proven."""

    tensors: Tensors
    manifest: dict[str, Any]
    log: array[int] | None


def save(
    path: Path,
    talk: Talk,
    policy: MemoryPolicy,
    model: Model,
    about: Mapping[str, Any],
    vault: Vault = PLAIN,
) -> None:
    """Write a conversation; a crash at any point leaves the one that was there before, or this one.

    The tokens lie in a file of their own beside it, which is appended to; where it does not begin like the
    conversation (turns were taken back, or a crash left half of one), another one is begun.

    Args:
        path: of the file.
        talk: between two turns.
        policy: of its memory.
        model: that read it.
        about: what else its owner wants to know again; JSON.
        vault: whose file it is, and what it is encrypted with.

    Raises:
        StoreWriteError: disk full, read-only, no permission; the old file is still there.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    try:
        make_folder(path.parent)
        log = None if talk.log is None else logs.write(path, talk.log, vault)
        manifest = {
            "model": _identity(model),
            "policy": described_policy(policy),
            "about": dict(about),
            "log": log and asdict(log),
            **_described(talk),
        }
        write_partial(partial, container.encoded(_tensors(talk), manifest, vault))
        commit(partial, path)
    except OSError as error:
        remove(partial)
        raise write_error(error, path) from error
    logs.tidy(path, log)
    for left in path.parent.glob(f"{escape(path.name)}.????????????{PARTIAL}"):
        remove(left)  # of a process that was killed


def read(path: Path, vault: Vault = PLAIN) -> Saved:
    """What a file holds.

    Raises:
        SessionDamaged: it is no such file, or not whole.
        SessionSealed: another key opens it, or it is another tenant's.
    """
    try:
        tensors, manifest = container.decoded(path.read_bytes(), vault, path)
        told = manifest["log"]
        log = None if told is None else logs.read(path, logs.Log(**told), vault)
    except FileNotFoundError as error:
        raise SessionDamaged(f"there is no session at {path}") from error
    except OSError as error:
        raise SessionDamaged(f"the session at {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SessionDamaged(
            f"{path} is not a session, or is damaged: {error}. Begin a new one; what was said is read again"
        ) from error
    return Saved(tensors, manifest, log)


def claimed(path: Path, vault: Vault = PLAIN) -> tuple[str | None, dict[str, Any]]:
    """The id of the session in a file and its manifest; reads no rows.

    Of a file that is not encrypted nothing of it is proven.

    Raises:
        SessionDamaged: it cannot be read at all.
        SessionSealed: another key opens it, or it is another tenant's.
    """
    try:
        manifest = container.claimed(path, vault)
        name = manifest["about"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SessionDamaged(f"{path} is not a session, or is damaged: {error}") from error
    return None if name is None else str(name), manifest


def files_of(folder: Path, vault: Vault) -> list[Path]:
    """The tenant's files in a folder, those that cannot be read included."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            label = container.heading(path)[0].get("tenant", "")
        except (OSError, ValueError, KeyError, TypeError):
            label = vault.label
        if label == vault.label:
            found.append(path)
    return found


def opening_of(manifest: Mapping[str, Any]) -> Opening:
    """What stands in front of a saved conversation.

    Raises:
        SessionDamaged: it does not say.
    """
    try:
        told = manifest["opening"]
        return Opening(
            told["text"],
            tuple(told["documents"]),
            told["prefix"],
            bool(told["is_rendered"]),
            tuple(told.get("names", ())),
            tuple(map(tuple, told.get("contexts", ()))),
        )
    except (KeyError, TypeError) as error:
        raise SessionDamaged(f"the session does not fit together: {error}") from error


def load(saved: Saved, model: Model, policy: MemoryPolicy, pinned: Pinned, *, max_undo: int) -> Talk:
    """The conversation that a file holds.

    Args:
        saved: what was read.
        model: that goes on with it.
        policy: of its memory.
        pinned: its opening, as it was read now.
        max_undo: turns that can be taken back.

    Raises:
        ConfigError: it was read by another model, or remembered by another policy.
        SessionDamaged: what it holds does not fit together.
    """
    check_model(saved.manifest, model)
    kept = saved.manifest["policy"]
    if kept != described_policy(policy):
        raise ConfigError(f"the session has the memory {kept}, not {policy}; open it with that one")
    try:
        return _loaded(saved, model, policy, pinned, max_undo)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SessionDamaged(f"the session does not fit together: {error}") from error


def policy_of(manifest: Mapping[str, Any]) -> MemoryPolicy:
    """The policy that a saved session was made with, if it is one of this package's.

    Raises:
        ConfigError: it is not; it has to be given.
    """
    told = manifest["policy"]
    if told["name"] not in POLICIES:
        raise ConfigError(f"the session has the memory {told}, which has to be given to open it")
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in told["fields"].items()}
    return POLICIES[told["name"]](**fields)


def described_policy(policy: MemoryPolicy) -> dict[str, Any]:
    """A policy in JSON."""
    return {"name": policy.name, "fields": _fields(policy)}


def check_model(manifest: Mapping[str, Any], model: Model) -> None:
    """Refuse rows of another model.

    Raises:
        ConfigError: says what is different.
    """
    mine, theirs = _identity(model), manifest["model"]
    wrong = [name for name, value in mine.items() if theirs.get(name) != value]
    if wrong:
        seen = ", ".join(f"{name} {theirs.get(name)!r}, not {mine[name]!r}" for name in wrong)
        raise ConfigError(f"the session was saved with another model ({seen}); open it with that one")


def _identity(model: Model) -> dict[str, str]:
    known = model.fingerprint()
    return {name: str(getattr(known, name)) for name in ("model", "tokenizer", "rope", "dtype")}


def _fields(policy: MemoryPolicy) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(policy), default=str))  # type: ignore[call-overload]
    return found


def _tensors(talk: Talk) -> Tensors:
    found = {f"rows.{name}": tensor for name, tensor in talk.rows.tensors().items()}
    found |= {f"state.{name}": tensor for name, tensor in talk.state.state().items()}
    for i, segment in enumerate(_own_segments(talk)):
        for layer, kv in enumerate(segment.kv.layers):
            found[f"pinned.{i}.{layer:03d}.keys"] = kv.keys
            found[f"pinned.{i}.{layer:03d}.values"] = kv.values
    for i, snapshot in enumerate(talk.snapshots):
        found |= {f"turn.{i}.state.{name}": tensor for name, tensor in snapshot.state.items()}
        for j, image in enumerate(images_of(snapshot.journal)):
            found |= {f"turn.{i}.image.{j}.{k:04d}": tensor for k, tensor in enumerate(image)}
    return found


def _own_segments(talk: Talk) -> list[Segment]:
    """What is pinned and no document: documents have entries in the store, which many sessions share."""
    return [segment for segment in talk.pinned.table if segment.document is None]


def _described(talk: Talk) -> dict[str, Any]:
    pinned = talk.pinned
    return {
        "digests": [_told(digest) for digest in talk.digests],
        "num_turns": talk.num_turns,
        "num_tokens": talk.state.seen,
        "opening": asdict(pinned.opening),
        "behind": talk.behind,
        "pinned": [
            {"tokens": list(s.kv.tokens), "target": s.target, "native": s.native} for s in _own_segments(talk)
        ],
        "turns": [
            {
                "digests": [_told(digest) for digest in snapshot.digests],
                "num_tokens": snapshot.num_tokens,
                "num_images": len(snapshot.journal.images),
            }
            for snapshot in talk.snapshots
        ],
    }


def _told(digest: TextDigest) -> dict[str, Any]:
    return {"length": digest.length, "chain": digest.chain.hex(), "tail": digest.tail}


def _digests(told: Mapping[str, Any]) -> tuple[TextDigest, ...]:
    return tuple(
        TextDigest(int(one["length"]), bytes.fromhex(one["chain"]), str(one["tail"]))
        for one in told["digests"]
    )


def _loaded(saved: Saved, model: Model, policy: MemoryPolicy, pinned: Pinned, max_undo: int) -> Talk:
    manifest = saved.manifest
    tensors = {name: tensor.to(model.device) for name, tensor in saved.tensors.items()}
    own = [_segment(tensors, i, told, model.num_layers) for i, told in enumerate(manifest["pinned"])]
    pinned = with_rows(pinned, SegmentTable(tuple(own)))
    talk = Talk(
        model,
        policy,
        pinned,
        keeps_log=saved.log is not None,
        max_undo=max_undo,
        behind=int(manifest.get("behind", pinned.num_tokens)),
    )
    talk.state.restore(_under(tensors, "state."))
    talk.rows.load(_under(tensors, "rows."))
    talk.digests, talk.num_turns = _digests(manifest), int(manifest["num_turns"])
    if saved.log is not None:
        talk.log = saved.log
    for i, turn in enumerate(manifest["turns"]):
        images = [
            [tensor for _, tensor in sorted(_under(tensors, f"turn.{i}.image.{j}.").items())]
            for j in range(turn["num_images"])
        ]
        state = _under(tensors, f"turn.{i}.state.")
        journal = journal_of(images, talk.rows)
        talk.snapshots.append(Snapshot(_digests(turn), state, int(turn["num_tokens"]), journal))
    return talk


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _segment(tensors: Tensors, i: int, told: Mapping[str, Any], num_layers: int) -> Segment:
    layers = tuple(
        LayerKV(tensors[f"pinned.{i}.{layer:03d}.keys"], tensors[f"pinned.{i}.{layer:03d}.values"])
        for layer in range(num_layers)
    )
    kv = KV(tuple(told["tokens"]), layers)
    return Segment(kv, int(told["target"]), native=int(told["native"]))


def delete(path: Path) -> bool:
    """Remove a saved conversation; False if there was none."""
    existed = remove(path)  # first: without it, the tokens are nobody's
    logs.tidy(path, None)
    return existed

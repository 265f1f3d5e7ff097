"""Trains the reader on a CPU: `python -m kvrag.reader.training RUN --until 21:05 --lengths 1024 2048`.

A run is a folder with one checkpoint. Calling again with other settings continues it: the curriculum (short
rows and plain sentences first) is a sequence of calls, given in the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import LlamaForCausalLM

from kvrag.reader import autograd, rows, start, tokenizer
from kvrag.reader.about import About
from kvrag.reader.muon import Muon
from kvrag.reader.world import Mix, World

STATE = "state.safetensors"

# glibc gives large blocks back to the system at once unless told otherwise; page faults then cost much time.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """Settings of one call.

    Attributes:
        run: folder of the checkpoint.
        until: wall-clock time of the end, "HH:MM".
        lengths: tokens of a row; each step takes one of these.
        batch_tokens: tokens of a step, in all processes together.
        document_tokens: shortest and longest average length of a row's documents.
        canonical: share of sentences in the words of the answers.
        pronouns: share of pronouns in first parts.
        chats: share of rows that are chats.
        confusable: share of entities that share a word of their name with another one.
        same_attributes: share of contexts whose documents of a kind tell the same attributes.
        muon_lr: learning rate of matrices.
        adam_lr: learning rate of everything else.
        decay_share: last share of the time, in which the learning rates fall to `final`.
        final: factor of the learning rates at the end.
        language: weight of the tokens that are not answers.
        about: weight of the auxiliary task.
        opening: weight of an answer's first word, which says whether there is an answer; of a value it is 1.
        seed: of this stage's rows.
        processes: data-parallel processes of one thread each.
        earlier: folder of an earlier reader to start from, or several of one shape, whose mean is taken; only
            without a checkpoint.
    """

    run: Path
    until: str
    lengths: tuple[int, ...] = (512,)
    batch_tokens: int = 8192
    document_tokens: tuple[int, int] = (30, 120)
    canonical: float = 0.35
    pronouns: float = 0.4
    chats: float = 0.12
    confusable: float = 0.35
    same_attributes: float = 0.35
    muon_lr: float = 0.01
    adam_lr: float = 3e-3
    decay_share: float = 0.0
    final: float = 0.0
    language: float = 0.1
    about: float = 0.2
    opening: float = 4.0
    seed: int = 0
    processes: int = 2
    earlier: Sequence[Path] = ()


def main() -> None:
    """Run one stage from the command line."""
    stage = _parse()
    stage.run.mkdir(parents=True, exist_ok=True)
    (stage.run / "rendezvous").unlink(missing_ok=True)
    os.environ |= _MALLOC | {"OMP_NUM_THREADS": "1"}
    deadline = _deadline(stage.until).timestamp()
    spawn(_process, (stage, deadline), nprocs=stage.processes)


def _parse() -> Stage:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--until", required=True)
    for name in ("batch_tokens", "seed", "processes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in (
        "canonical",
        "pronouns",
        "chats",
        "confusable",
        "same_attributes",
        "muon_lr",
        "adam_lr",
        "decay_share",
        "final",
        "language",
        "about",
        "opening",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--document-tokens", type=int, nargs=2)
    parser.add_argument("--earlier", type=Path, nargs="+")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    return Stage(**given)


def _deadline(until: str) -> datetime:
    now = datetime.now()
    hour, minute = map(int, until.split(":"))
    deadline = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return deadline if deadline > now else deadline + timedelta(days=1)


def _process(rank: int, stage: Stage, deadline: float) -> None:
    torch.set_num_threads(1)
    rendezvous = (stage.run / "rendezvous").resolve().as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=stage.processes)
    try:
        Trainer(stage, rank, deadline).run()
    finally:
        dist.destroy_process_group()


@dataclass(slots=True)
class _Sums:
    """What is reported every few steps: sums over `steps`."""

    steps: int = 0
    answer_loss: float = 0.0
    language_loss: float = 0.0
    right: float = 0.0
    right_values: float = 0.0
    about: float = 0.0

    def means(self) -> dict[str, float]:
        return {
            name: round(getattr(self, name) / self.steps, 4)
            for name in ("answer_loss", "language_loss", "right", "right_values", "about")
        }


@dataclass(slots=True)
class _Progress:
    """What a checkpoint counts."""

    steps: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One process of a stage."""

    def __init__(self, stage: Stage, rank: int, deadline: float) -> None:
        self.stage, self.rank, self.deadline = stage, rank, deadline
        self.began = self.saved = time.time()
        self.tokenizer = tokenizer.build()
        self.encoder = tokenizer.Encoder(self.tokenizer)
        self.progress = _Progress()
        self.model = self._model()
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        torch.manual_seed(0)  # the same in all processes
        self.about = About(self.model.config.hidden_size)
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        self.parameters = [*self.model.parameters(), *self.about.parameters()]
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, lr=stage.muon_lr), stage.muon_lr),
            (_adam(rest, stage.adam_lr), stage.adam_lr),
            (_adam(self.about.parameters(), stage.adam_lr), stage.adam_lr),
        ]
        self._load()
        self.mean = _Mean(self.model)
        seed = 1000 * (stage.seed + 1) + 7919 * self.progress.steps + rank
        self.rng = random.Random(seed)
        self.world = World(seed, held_out=False)
        torch.manual_seed(seed)

    def run(self) -> None:
        """Train until the deadline."""
        sums, cpu = _Sums(), time.process_time()
        done = 0.0
        warm = 0
        while done < 1:
            warm += 1
            done = self._step(self._factor(done) * min(1.0, warm / 30), sums)
            self.mean.add(warm)
            if self.rank:
                continue
            if sums.steps == 50 or done >= 1:
                self.progress.cpu_seconds += time.process_time() - cpu
                cpu = time.process_time()
                self._report(sums)
                sums = _Sums()
            if time.time() - self.saved > 150 or done >= 1:
                self.save()

    def _step(self, factor: float, sums: _Sums) -> float:
        """Train one batch and return the share of the stage's time that is over."""
        ids, kinds, about = self._batch()
        after = autograd.hidden_states(self.model, ids)
        target, kind = ids[:, 1:], kinds[:, 1:]
        chosen = (kind != rows.OTHER) | (torch.rand(kind.shape) < 0.06)
        opens = (ids[:, :-1] == self.encoder.special["<|assistant|>"])[chosen]
        target, kind, before = target[chosen], kind[chosen], kinds[:, :-1][chosen]
        logits = autograd.logits(self.model, after[-1][:, :-1][chosen])
        losses = F.cross_entropy(logits, target, reduction="none")
        answer = kind != rows.OTHER
        weight = torch.where(kind == rows.VALUE, torch.where(opens, self.stage.opening, 1.0), 0.3)[answer]
        answer_loss = (losses[answer] * weight).sum() / weight.sum().clamp(min=1)
        language_loss = losses[~answer].mean()
        embeddings = self.model.model.embed_tokens.weight
        about_loss, right_names = self.about(after, about, embeddings)
        torch.autograd.backward(
            answer_loss + self.stage.language * language_loss + self.stage.about * about_loss
        )
        now = (time.time() - self.began) / (self.deadline - self.began)
        now = self._share_gradients(now)
        for optimiser, lr in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
        right = (logits.argmax(-1) == target).float()
        found = (kind == rows.VALUE) & (before != rows.VALUE)
        sums.steps += 1
        sums.answer_loss += answer_loss.item()
        sums.language_loss += language_loss.item()
        sums.right += _mean(right[answer])
        sums.right_values += _mean(right[found])
        sums.about += right_names
        self.progress.steps += 1
        self.progress.tokens += ids.numel() * self.stage.processes
        return now

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        # The same length in all processes, or one would wait for the other.
        length = random.Random(self.progress.steps).choice(self.stage.lengths)
        num = max(1, round(self.stage.batch_tokens / length / self.stage.processes))
        drawn = [self._row(length) for _ in range(num)]
        ids, kinds, about = zip(*((row.ids, row.kinds, row.about) for row in drawn), strict=True)
        return torch.tensor(ids), torch.tensor(kinds), torch.tensor(about)

    def _row(self, length: int) -> rows.Row:
        stage, rng = self.stage, self.rng
        if rng.random() < stage.chats:
            return rows.chat_row(self.world, self.encoder, length)
        low, high = stage.document_tokens
        average = math.exp(rng.uniform(math.log(low), math.log(high)))
        most = max(3, min(10, round(average / 12)))
        self.world.mix = Mix(
            tokens=(round(average * 0.6), round(average * 1.6)),
            facts=(max(2, most // 2), most),
            crossing=rng.choice((0.2, 0.5, 0.8)),
            dated=rng.choice((0.05, 0.1, 0.25)),
            linked=rng.choice((0.4, 0.8)),
            confusable=stage.confusable,
            same_attributes=stage.same_attributes,
            canonical=rng.choice((stage.canonical, 0.15)),
            pronouns=stage.pronouns,
        )
        return rows.document_row(self.world, self.encoder, length, share=rng.uniform(0.35, 0.8))

    def _factor(self, done: float) -> float:
        """Of the learning rates, when this share of the time is over."""
        left = (1 - done) / self.stage.decay_share if self.stage.decay_share else 1.0
        return self.stage.final + (1 - self.stage.final) * min(1.0, max(0.0, left))

    def _share_gradients(self, now: float) -> float:
        """Average the gradients, and the clocks, of all processes."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        flat = torch.cat([g.reshape(-1) for g in gradients] + [torch.tensor([now])])
        dist.all_reduce(flat)
        flat /= self.stage.processes
        parts = torch.split(flat[:-1], [g.numel() for g in gradients])
        for gradient, shared in zip(gradients, parts, strict=True):
            gradient.copy_(shared.view_as(gradient))
        return float(flat[-1])

    def _report(self, sums: _Sums) -> None:
        progress = self.progress
        point = {
            "step": progress.steps,
            "tokens": progress.tokens,
            "cpu_seconds": round(progress.cpu_seconds),
            "lengths": self.stage.lengths,
            **sums.means(),
        }
        progress.curve.append(point)
        with (self.stage.run / "log.jsonl").open("a") as file:
            file.write(json.dumps(point | {"stage_seconds": round(time.time() - self.began)}) + "\n")

    def _model(self) -> LlamaForCausalLM:
        if (self.stage.run / STATE).exists():
            return LlamaForCausalLM(start.config(self.tokenizer))
        if len(self.stage.earlier) > 1:
            return start.averaged(self.stage.earlier)
        if self.stage.earlier:
            return start.from_earlier(self.stage.earlier[0], self.tokenizer)
        return start.structured(self.tokenizer)

    def _load(self) -> None:
        path = self.stage.run / STATE
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            told = json.loads(file.metadata()["training"])
        weights = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        self.model.load_state_dict(weights, strict=False)  # the tied output is not stored twice
        with torch.no_grad():
            self.about.projections.copy_(state["about.projections"])
        for i, (optimiser, _) in enumerate(self.optimisers):
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in state.items():
                kind, _, rest = name.partition(".")
                if kind == f"optimiser{i}":
                    parameter, _, moment = rest.partition(".")
                    moments.setdefault(int(parameter), {})[moment] = tensor
            optimiser.load_state_dict({"state": moments, "param_groups": told["groups"][i]})
        self.progress = _Progress(**told["progress"])

    def save(self) -> None:
        """Write the checkpoint and a folder that transformers can load."""
        progress = self.progress
        state = {f"model.{name}": tensor for name, tensor in self.model.named_parameters()}
        state |= {f"about.{name}": tensor for name, tensor in self.about.named_parameters()}
        groups = []
        for i, (optimiser, _) in enumerate(self.optimisers):
            saved = optimiser.state_dict()
            groups.append(saved["param_groups"])
            for parameter, moments in saved["state"].items():
                state |= {f"optimiser{i}.{parameter}.{name}": tensor for name, tensor in moments.items()}
        told = {
            "groups": groups,
            "progress": {
                name: getattr(progress, name) for name in ("steps", "tokens", "cpu_seconds", "curve")
            },
        }
        partial = self.stage.run / f"{STATE}.partial"
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in state.items()},
            partial,
            metadata={"training": json.dumps(told)},
        )
        partial.replace(self.stage.run / STATE)
        export(self.model, self.tokenizer, self.stage.run / "model")
        with self.mean.in_place():
            export(self.model, self.tokenizer, self.stage.run / "mean")
        (self.stage.run / "learning_curve.json").write_text(json.dumps(progress.curve, indent=0))
        self.saved = time.time()


class _Mean:
    """The mean of the weights over the last steps of a call, which is often better than where it ends."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._parameters = list(model.parameters())
        self._means = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Count the weights after the call's step `step`, from 1: about the last 80 count."""
        share = max(0.012, 1 / step)
        for mean, parameter in zip(self._means, self._parameters, strict=True):
            mean.lerp_(parameter, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the mean's weights."""
        kept = [p.detach().clone() for p in self._parameters]
        self._put(self._means)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def _adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def _mean(x: Tensor) -> float:
    """Mean, or 0 where a batch has nothing to count: documents may fill a row up to its end."""
    return x.mean().item() if len(x) else 0.0


def export(model: LlamaForCausalLM, made: Any, folder: Path) -> None:
    """Write the model and its tokenizer as transformers reads them; the weights change at once."""
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    made.save_pretrained(partial)
    folder.mkdir(exist_ok=True)
    for file in partial.iterdir():
        file.replace(folder / file.name)


if __name__ == "__main__":
    main()

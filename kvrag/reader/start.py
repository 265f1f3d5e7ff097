"""Where training starts: weights of an earlier reader in a new shape, or a structured initialisation.

Neither is needed with far more tokens than two CPU cores can train; both only shorten the time until the
model finds out that answers are to be looked up in its context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvrag.reader.tokenizer import MAX_LENGTH, SPECIAL

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KEY_HEADS, HEAD_DIM, THETA = 128, 256, 5, 4, 2, 32, 100_000.0
# Layers of an earlier reader go to these places; the others begin as layers that change nothing.
_PLACES = (0, 1, 3, 4)


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The reader's configuration."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )


@torch.no_grad()
def from_earlier(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A new reader that computes what the earlier one of the same width in `folder` computes.

    Embeddings are carried over by word, a new word's is drawn like the others; more layers and more
    feed-forward units begin with zero output. One of the same shape and vocabulary is simply gone on with.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    old = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = LlamaForCausalLM(config(tokenizer))
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    if vocabulary == tokenizer.get_vocab() and len(old.model.layers) == len(model.model.layers):
        return old
    _carry_embeddings(old, vocabulary, model, tokenizer, generator)
    model.model.norm.weight.copy_(old.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        if i not in _PLACES:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            continue
        weights = old.model.layers[_PLACES.index(i)].state_dict()
        for name, parameter in layer.named_parameters():
            part = weights[name]
            if name.endswith("down_proj.weight"):
                parameter.zero_()
            parameter[tuple(slice(0, n) for n in part.shape)] = part
    return model


def _carry_embeddings(
    old: LlamaForCausalLM,
    old_ids: dict[str, int],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    generator: torch.Generator,
) -> None:
    source, target = old.model.embed_tokens.weight, model.model.embed_tokens.weight
    ordinary = source[[i for token, i in old_ids.items() if token.lstrip("▁ ").isalpha() and len(token) > 2]]
    drawn: dict[str, Tensor] = {}
    for token, i in tokenizer.get_vocab().items():
        word = token.strip(" ")
        forms: tuple[str, ...] = (
            ("<|doc|>",) if token == "\n\n" else (token, token.replace(" ", "▁"), f"▁{word}", word)
        )
        # Lone letters and digits, which it never met, lie on top of each other in the earlier reader.
        forms = () if len(token) == 1 and token.isalnum() else forms
        known = next((old_ids[form] for form in forms if form in old_ids), None)
        if known is None and word not in drawn:
            # Half the variance of two words each: a word like others, equal to none.
            pair = torch.randint(len(ordinary), (2,), generator=generator)
            drawn[word] = ordinary.mean(0) + (ordinary[pair] - ordinary.mean(0)).sum(0) / 2**0.5
        target[i] = source[known] if known is not None else drawn[word]
    length = ordinary.norm(dim=1).mean()
    directions = torch.linalg.qr(torch.randn(HIDDEN, 3, generator=generator))[0].T
    vocabulary = tokenizer.get_vocab()
    for number in range(100):
        # A hint of order among two-digit tokens, for comparisons.
        angle = number / 100 * math.pi
        hint = torch.tensor([math.cos(angle), math.cos(2 * angle), math.sin(2 * angle)]) @ directions
        for form in (f"{number:02d}", f" {number:02d}"):
            target[vocabulary[form]] += 0.25 * length * hint


@torch.no_grad()
def averaged(folders: Sequence[Path]) -> LlamaForCausalLM:
    """The mean of readers of one shape and vocabulary, from one run of training.

    Weights from different ends of a run often make a better reader than any of them (Wortsman et al. 2022,
    "Model soups", arXiv:2203.05482).
    """
    model, *others = [LlamaForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders]
    for p, *same in zip(model.parameters(), *(o.parameters() for o in others), strict=True):
        p.copy_(torch.stack([p, *same]).mean(0))
    return model


@torch.no_grad()
def structured(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A model whose first layer looks one and two tokens back; later layers match content and copy it."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(tokenizer))
    frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    mean = torch.ones(HIDDEN) / HIDDEN**0.5
    embeddings = model.model.embed_tokens.weight
    drawn = 0.1 * torch.randn(embeddings.shape, generator=generator)
    embeddings.copy_(drawn - (drawn @ mean)[:, None] * mean + 0.4 * mean)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def orthogonal_rows(n: int) -> Tensor:
        x = random(HIDDEN, n)
        rows: Tensor = torch.linalg.qr(x - mean[:, None] * (mean @ x))[0].T.contiguous()
        return rows

    back = [torch.linalg.qr(random(HIDDEN, HIDDEN))[0] for _ in range(2)]
    carried = orthogonal_rows(HEAD_DIM)
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
            weight.copy_(0.3 * HIDDEN**-0.5 * random(*weight.shape))
        attention.o_proj.weight.copy_(0.05 * HIDDEN**-0.5 * random(*attention.o_proj.weight.shape))
        mlp.down_proj.weight.zero_()
        views = _by_head(attention)
        if i == 0:
            _look_back(views, frequencies, mean, carried, back)
        else:
            _match_and_copy(views, frequencies, carried, back, random, orthogonal_rows)
    return model


def _by_head(attention: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views [heads, D, d] of the query, key and value weights and [d, heads, D] of the output's."""
    q = attention.get_parameter("q_proj.weight").view(HEADS, HEAD_DIM, HIDDEN)
    k = attention.get_parameter("k_proj.weight").view(KEY_HEADS, HEAD_DIM, HIDDEN)
    v = attention.get_parameter("v_proj.weight").view(KEY_HEADS, HEAD_DIM, HIDDEN)
    return q, k, v, attention.get_parameter("o_proj.weight").view(HIDDEN, HEADS, HEAD_DIM)


def _look_back(
    views: tuple[Tensor, Tensor, Tensor, Tensor],
    frequencies: Tensor,
    mean: Tensor,
    carried: Tensor,
    back: list[Tensor],
) -> None:
    """The heads of the first key head attend one and two tokens back, whatever the content."""
    q, k, v, o = views
    k[0] = 0
    k[0, :3] = 3.0 * mean
    v[0] = carried
    for head in range(HEADS // KEY_HEADS):
        angle = frequencies[:3] * (head + 1)
        q[head] = 0
        q[head, :3] = 3.0 * angle.cos()[:, None] * mean
        q[head, HEAD_DIM // 2 : HEAD_DIM // 2 + 3] = -3.0 * angle.sin()[:, None] * mean
        o[:, head] = 0.3 * (back[head % 2] @ carried.T)


def _match_and_copy(
    views: tuple[Tensor, Tensor, Tensor, Tensor],
    frequencies: Tensor,
    carried: Tensor,
    back: list[Tensor],
    random: Callable[..., Tensor],
    orthogonal_rows: Callable[[int], Tensor],
) -> None:
    """Queries from this token match keys from the token one or two before; the value is copied."""
    q, k, v, o = views
    slow = [i for i in range(HEAD_DIM // 2) if frequencies[i] < 0.004]
    rows = slow + [i + HEAD_DIM // 2 for i in slow]
    for j in range(KEY_HEADS):
        copied = orthogonal_rows(HEAD_DIM)
        match = 1.5 * torch.linalg.qr(random(HEAD_DIM, HEAD_DIM))[0][: len(rows)] @ carried
        k[j] *= 0.1
        k[j, rows] += match @ back[j % 2].T
        v[j] = copied
        group = HEADS // KEY_HEADS
        for head in range(j * group, (j + 1) * group):
            q[head] *= 0.1
            q[head, rows] += match
            o[:, head] = 0.2 * copied.T

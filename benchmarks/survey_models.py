"""Which of transformers' causal models kvrag serves exactly, and why it refuses the others.

Every type of transformers' causal language models is built tiny, with random weights, and compared: a plain
prompt with the stock model's eager attention, then documents read apart and placed before a question with one
pass of the same model under the equivalent block mask. Writes docs/models.md and docs/data/models.json.

    python benchmarks/survey_models.py            all types, a few minutes
    python benchmarks/survey_models.py --smoke    three types, nothing is written
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvrag.encoding import encode
from kvrag.errors import UnsupportedModel
from kvrag.fresh import FreshRows
from kvrag.model import Model
from kvrag.prefill import read
from kvrag.segments import Segment, SegmentTable
from kvrag.testing.models import randomize, tiny_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
SMOKE = ("gemma4_text", "gpt_oss", "gpt2")
WINDOW = 16
TOLERANCE = 1e-4
MOST_PARAMETERS = 100_000_000

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size".split(), 320
    ),
    **dict.fromkeys("hidden_size n_embd d_model dim_model embedding_size word_embed_proj_dim".split(), 64),
    **dict.fromkeys("input_embedding_size output_embedding_size emb_dim embedding_dim".split(), 64),
    **dict.fromkeys("attention_hidden_size lru_width ple_embed_dim backbone_hidden_size".split(), 64),
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split(), 4),
    **dict.fromkeys("num_encoder_layers num_decoder_layers num_blocks".split(), 4),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads decoder_attention_heads".split(), 4),
    **dict.fromkeys("encoder_attention_heads swa_num_attention_heads attention_heads".split(), 4),
    **dict.fromkeys("num_encoder_attention_heads num_decoder_attention_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups".split(), 2),
    **dict.fromkeys("head_dim dim_head swa_head_dim global_head_dim swa_v_head_dim".split(), 16),
    **dict.fromkeys(
        "attention_head_dim attention_head_size kv_channels d_head query_pre_attn_scalar".split(), 16
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff".split(), 96
    ),
    **dict.fromkeys(
        "dim_ff d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size".split(), 96
    ),
    **dict.fromkeys(
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size".split(), 32
    ),
    **dict.fromkeys(
        "shared_experts_intermediate_size shared_intermediate_size router_hidden_size".split(), 32
    ),
    **dict.fromkeys("moe_shared_expert_intermediate_size hidden_size_per_layer_input".split(), 32),
    **dict.fromkeys("num_experts n_routed_experts num_local_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token".split(), 2),
    **dict.fromkeys(
        "sliding_window sliding_window_size local_attention attention_window_size".split(), WINDOW
    ),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx context_length max_seq_len".split(), 1024),
    **dict.fromkeys("model_max_length max_sequence_length".split(), 1024),
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 20,
    "v_head_dim": 14,
    "n_group": 2,
    "topk_group": 1,
    "rotary_dim": 8,
    "laurel_rank": 8,
    "num_kv_shared_layers": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "use_cache": False,
    "image_size": 32,
    "patch_size": 8,
    "depth": 2,
}
# Where one size for all does not fit together, or where the defaults lack what checkpoints of the type have.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral3": {
        "max_position_embeddings": 32_768
    },  # beyond the length from which on it scales its queries
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "moshi": {"audio_vocab_size": 320},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_shared_experts": 1},
    "hunyuan_v1_moe": {"num_experts": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "longcat_flash": {"head_dim": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "zamba": {"num_hidden_layers": 8},
    "zamba2": {"num_hidden_layers": 8, "layers_block_type": None},
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "qk_head_dim": None,
}  # MLA makes its heads from latents


@dataclass(frozen=True)
class Verdict:
    """What became of one model type.

    Attributes:
        type: transformers' name.
        outcome: exact, inexact, refused, or not built.
        reason: of a refusal or failure.
        layers: kinds of attention layers, of exact ones.
        error: largest relative error of plain and composed logits.
    """

    type: str
    outcome: str
    reason: str = ""
    layers: str = ""
    error: float | None = None


def tiny_settings(default: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that make a configuration small, sub-configurations included."""
    held = vars(default)
    known = set(held) | set(default.attribute_map)
    settings = {k: v for k, v in _SIZES.items() if k in known and not isinstance(held.get(k), list)}
    if "kv_lora_rank" in known:
        settings |= {k: v for k, v in _LATENT.items() if k in known}
        settings = {k: v for k, v in settings.items() if v is not None}
    if held.get("num_experts", 1) is None:  # a switch for mixtures, which is off
        del settings["num_experts"]
    settings |= {k: tiny_settings(v) for k, v in held.items() if isinstance(v, PreTrainedConfig)}
    if set(held.get("layer_types") or []) == {"sliding_attention", "full_attention"}:
        settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    settings |= _EXCEPTIONS.get(default.model_type, {})
    return {k: v for k, v in settings.items() if v is not None}


def build(name: str) -> PreTrainedModel:
    """A tiny random model of a type, with eager attention where it has that."""
    config_class = CONFIG_MAPPING[name]
    config = config_class(**tiny_settings(config_class()))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"it still has {size:,} parameters")
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made: PreTrainedModel = randomize(model).eval()
    return made


_masks: ContextVar[Sequence[torch.Tensor]] = ContextVar("masks")


def _dense(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,  # noqa: ARG001 - handed over by name in some families
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with explicit float64 scores under the mask of the layer; positions are the model's own."""
    groups = query.shape[1] // key.shape[1]
    scores = torch.matmul(query.double(), key.double().repeat_interleave(groups, 1).transpose(2, 3))
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_masks.get()[module.layer_idx], float("-inf"))
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    probs = scores.softmax(-1)[..., : key.shape[2]]
    out = torch.matmul(probs, value.double().repeat_interleave(groups, 1))
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


@torch.no_grad()
def examine(name: str) -> Verdict:
    """Build, probe and compare one type."""
    try:
        stock = build(name)
        tokens = torch.randint(10, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
        expected = stock(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    except Exception as error:
        return Verdict(name, "not built", _line(error))
    if not bool(expected.isfinite().all()):
        return Verdict(name, "not built", "the tiny stock model's logits are not finite")
    try:
        model = Model(build(name), tiny_tokenizer())
    except UnsupportedModel as error:
        return Verdict(name, "refused", str(error).split("cannot be used: ", 1)[-1])
    layers = _layers(model)
    fresh = FreshRows(model.num_layers)
    plain = read(model, SegmentTable(), tokens, range(len(tokens)), fresh, logits_to_keep=0).logits
    error = max(_off(plain, expected), _composed(model, tokens))
    return Verdict(name, "exact" if error < TOLERANCE else "inexact", layers=layers, error=error)


def _composed(model: Model, tokens: Sequence[int]) -> float:
    """Documents in another order with gaps between them, and a question: against one pass with a block mask.

    Leaves the model with the other attention.
    """
    pieces = [tuple(tokens[a:b]) for a, b in ((0, 20), (20, 31), (31, 50))]
    question = tuple(tokens[50:])
    order, targets, at = (2, 0, 1), [], 0
    for i in order:
        targets.append(at)
        at += len(pieces[i]) + 3
    positions = range(at, at + len(question))
    kvs = encode(model, pieces)
    table = SegmentTable(tuple(Segment(kvs[i], t, 0, i) for i, t in zip(order, targets, strict=True)))
    got = read(model, table, question, positions, FreshRows(model.num_layers), logits_to_keep=0).logits

    parts = [*(pieces[i] for i in order), question]
    where = torch.cat([torch.arange(s, s + len(p)) for s, p in zip([*targets, at], parts, strict=True)])
    of = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
    rows = torch.arange(len(of))
    seen = (rows[:, None] >= rows) & ((of[:, None] == of) | (of[:, None] == len(order)))
    near = where[:, None] - where
    masks = [seen if s.window is None else seen & (near < s.window) for s in model.specs]
    AttentionInterface.register("survey_dense", _dense)
    model.network.set_attn_implementation("survey_dense")
    _masks.set(masks)
    ids = torch.tensor([[t for part in parts for t in part]])
    out = model.network(input_ids=ids, position_ids=where[None], use_cache=False).logits[0]
    return _off(got, out[-len(question) :])


def _layers(model: Model) -> str:
    """The kinds of layers in words."""
    (kv,) = encode(model, [(10,)])
    words = []
    for spec, rows in zip(model.specs, kv.layers, strict=True):
        rotation = spec.rotation
        if rotation is None:
            word = "no positions"
        else:
            rest = rows.keys.shape[-1] - 2 * len(rotation.frequencies)
            part = f"{'last' if rotation.start else 'first'} dimensions" if rest else ""
            back = "backwards" if rotation.sign < 0 else ""
            word = ", ".join(w for w in (rotation.layout, part, back) if w)
        words.append(word if spec.window is None else f"{word}, window")
    return "; ".join(dict.fromkeys(words))


def _line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return f"tiny configuration failed: {text[:140]}"


def _child(name: str, results: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        results.send(examine(name))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        results.send(Verdict(name, "failed", f"{type(error).__name__} in {where.name}: {_line(error)[27:]}"))


def guarded(name: str, seconds: float) -> Verdict:
    """Examine one type in a process of its own, so that no model can end the survey."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, send))
    process.start()
    send.close()
    try:
        return (
            receive.recv()
            if receive.poll(seconds)
            else Verdict(name, "not built", f"took over {seconds:.0f} s")
        )
    except EOFError:
        return Verdict(name, "failed", "its process ended early")
    finally:
        process.kill()
        process.join()


PAGE = """\
# Models

kvrag has no list of model families. When a model is loaded, a few forward passes of eight tokens find out
how each layer rotates queries and keys and what it masks, and prove it; a model that they do not explain is
refused with the reason. This page shows what that means for every type of causal language model that
transformers knows. It is generated by `python benchmarks/survey_models.py` (transformers {transformers},
torch {torch}).

Of {total} types, {counts}.

Each type is built tiny from its own configuration class: four layers, 64 wide, windows of {window}, random
weights in every layer and norm, float32. *Exact* means that two comparisons agree to a relative error of
{tolerance:g} (the largest seen is {worst:.1e}): a plain prompt against the stock model with eager
attention, and documents that were read apart, placed in another order with gaps between them and followed
by a question, against one pass of the same model with the equivalent block mask and positions. A checkpoint
is probed again when it is loaded: settings of its configuration can turn an exact type into one that is
refused. Of types that read images or sounds too, the text part is meant.

## Exact

In the column *layers*, `half` and `interleaved` say which dimensions of a head form a pair that is rotated,
`first` and `last dimensions` that only these are rotated, `backwards` that the angle is negative, `window`
that the layer sees the last positions only.

| type | layers | error |
|---|---|---|
{exact}
"""

REST = (
    ("inexact", "Inexact", "Accepted, but the comparison disagrees. This would be a bug."),
    ("failed", "Failed", "Accepted, but the comparison could not be made. This would be a bug."),
    ("refused", "Refused", "`Model.load` raises `UnsupportedModel` with this reason."),
    ("not built", "Not built", "No tiny model of this type could be made; nothing is said about it."),
)


def page(verdicts: Sequence[Verdict], versions: dict[str, str]) -> str:
    """The survey as Markdown."""
    counts = Counter(v.outcome for v in verdicts)
    exact = [v for v in verdicts if v.outcome == "exact"]
    text = PAGE.format(
        **versions,
        total=len(verdicts),
        counts=", ".join(f"{n} are {outcome}" for outcome, n in counts.most_common()),
        window=WINDOW,
        tolerance=TOLERANCE,
        worst=max((v.error or 0.0 for v in exact), default=0.0),
        exact="\n".join(f"| {v.type} | {v.layers} | {v.error:.1e} |" for v in exact),
    )
    for outcome, title, meaning in REST:
        found = [v for v in verdicts if v.outcome == outcome]
        if found:
            rows = (f"| {v.type} | {v.reason.replace('|', '/')} |" for v in found)
            text += "\n".join(
                ("", f"## {title}", "", meaning, "", "| type | reason |", "|---|---|", *rows, "")
            )
    return text


def main() -> int:
    """Run the survey; exit status 1 if a model is inexact or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="only these; nothing is written")
    parser.add_argument("--smoke", action="store_true", help=f"only {', '.join(SMOKE)}; nothing is written")
    parser.add_argument("--seconds", type=float, default=60, help="time limit per type")
    arguments = parser.parse_args()
    names = arguments.types or (SMOKE if arguments.smoke else tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    print(" ".join(f"{k} {v}" for k, v in versions.items()))
    start = time.perf_counter()
    verdicts = []
    for name in names:
        verdicts.append(guarded(name, arguments.seconds))
        v = verdicts[-1]
        print(f"{v.type:28s} {v.outcome:10s} {v.reason or f'{v.error:.1e}  {v.layers}'}", flush=True)
    counts = Counter(v.outcome for v in verdicts)
    print(f"{dict(counts)} in {time.perf_counter() - start:.0f} s")
    if len(names) == len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        (DOCS / "data").mkdir(exist_ok=True)
        record = {"versions": versions, "models": [asdict(v) for v in verdicts]}
        (DOCS / "data" / "models.json").write_text(json.dumps(record, indent=1) + "\n")
        (DOCS / "models.md").write_text(page(verdicts, versions))
    return 1 if counts["inexact"] or counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

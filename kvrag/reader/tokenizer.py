"""The reader's tokenizer: words of its world as single tokens, digits in pairs, the rest by letter.

Text is first cut into pieces by `PIECES`, whatever stands around them, and a blank line is its own piece. So
texts joined by a blank line may be encoded one by one: the concatenated ids are those of the whole.
(A text that itself begins or ends with a line break is the one exception.)
"""

from __future__ import annotations

import re
import string
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvrag.reader import facts, names, prose

SPECIAL = ("<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
BLANK_LINE = "\n\n"
MAX_LENGTH = 2304
"""Tokens of the longest training row; what lies beyond is outside what the model knows."""
SYSTEM_DOCUMENTS = "Answer from the documents."
SYSTEM_CHAT = "You are a helpful assistant."

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '" + SYSTEM_CHAT + "' %}{% set turns = messages %}{% endif %}"
    "<|system|> {{ first }}<|end|>"
    "{% for message in turns %}<|{{ message['role'] }}|> {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PIECES = r"\n\n|'s| ?[A-Za-z]+| ?[0-9]{1,2}|[^A-Za-z0-9]"
_PIECES = re.compile(PIECES)

# Words of ordinary prompts that the world does not use, so that such prompts stay short.
_PROMPT_WORDS = """
Use Using Given Context context following pieces piece information below above Question question Answer
answer answers based only provided retrieved assistant tasks task you your user helpful if don know just say
try make up use three sentences maximum keep concise Chunk chunk Document Documents document Source source
Title title Page page User Human System Assistant Please please help according text passage passages Do Not
not prior knowledge without query Query Reply reply with from and or but because so then than that this
these those which what when where who how why all any each no yes Yes No
"""


def words() -> list[str]:
    """Every word of the world and of ordinary prompts, sorted."""
    pools = [
        names.FEMALE,
        names.MALE,
        names.SURNAMES,
        names.CITIES,
        names.FIRMS,
        names.FIRM_ENDINGS,
        names.VILLAGES,
        names.VILLAGE_BEGINNINGS,
        names.PROJECTS,
        names.PROJECT_ENDINGS,
        names.PETS,
        names.RIVERS,
        names.MONTHS,
        names.COLOURS,
        names.JOBS,
        names.HOBBIES,
        names.FOODS,
        names.PRODUCTS,
        names.STATUSES,
        names.LANGUAGES,
    ]
    text = [SYSTEM_DOCUMENTS, SYSTEM_CHAT, prose.UNKNOWN, _PROMPT_WORDS]
    text += ["She He It Her His Its she he it her his its The the My my Your Since since now"]
    text += ["The pass key is Remember it What is my pass key Notes"]
    for attribute in (a for table in facts.ATTRIBUTES.values() for a in table):
        text += [attribute.kind, attribute.canonical, attribute.noun, *attribute.statements]
        text += [*attribute.questions, *(attribute.versus or ())]
    text += [*prose.FILLER, *prose.HAY, *prose.ACKNOWLEDGEMENTS, *prose.CORRECTIONS]
    text += [side for turn in prose.TALK for side in turn]
    found = set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", " ".join(text))))
    return sorted(found.union(*pools))


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template."""
    whole = [form for word in words() for form in (f" {word}", word)]
    pairs = [f"{i:02d}" for i in range(100)]
    letters = [c for c in string.printable if c.isprintable() and c != " "]
    scores: dict[str, float] = dict.fromkeys((*SPECIAL, "<unk>"), 0.0)
    scores |= {f"<0x{i:02X}>": 0.0 for i in range(256)}
    scores |= dict.fromkeys((BLANK_LINE, "'s", *whole, *pairs), -1.0)
    scores |= dict.fromkeys((f" {pair}" for pair in pairs), -1.0)
    scores |= {c: -8.0 for c in (" ", "\n", *letters, *(f" {d}" for d in string.digits)) if c not in scores}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=len(SPECIAL), byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(SPECIAL))
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Encoder:
    """Fast encoding of the generator's own text: pieces are looked up, and encoded properly when new."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._piece = cache(self._encode_piece)
        self.special: dict[str, int] = {token: i for i, token in enumerate(SPECIAL)}

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(piece, add_special_tokens=False).ids)

    def __call__(self, text: str) -> list[int]:
        """Ids of text without special tokens."""
        return [i for piece in _PIECES.findall(text) for i in self._piece(piece)]


def num_pieces(text: str) -> int:
    """Number of pieces of the text: its length in tokens where all its words are known."""
    return len(_PIECES.findall(text))

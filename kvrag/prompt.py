"""The form of a question over documents, in the words of the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvrag.errors import InputError
from kvrag.text import Text

INSTRUCTION = "Answer from the documents."
_DOCUMENTS, _QUESTION = "\u2063documents\u2063", "\u2063question\u2063"


@dataclass(frozen=True, slots=True)
class RagPrompt:
    """A prompt as fixed text around documents and a question.

    Attributes:
        prefix: everything before the documents; what they are encoded behind.
        middle: between documents and question.
        suffix: after the question.
        separator: between documents.
        is_rendered: a chat template wrote it, with any BOS that it needs.
    """

    prefix: str
    middle: str = ""
    suffix: str = ""
    separator: str = "\n\n"
    is_rendered: bool = True

    @classmethod
    def of(cls, text: Text, *, instruction: str = INSTRUCTION) -> RagPrompt:
        """The form that fits a model: documents in the system message, the question from the user.

        Models whose template knows no system message get both from the user; models without a template get
        plain text.
        """
        if not text.has_template:
            return cls(f"{instruction}\n\n", "\n\nQuestion: ", "\nAnswer:", is_rendered=False)
        try:
            return cls._around(
                text.render(
                    [
                        {"role": "system", "content": f"{instruction}\n\n{_DOCUMENTS}"},
                        {"role": "user", "content": _QUESTION},
                    ]
                )
            )
        except InputError:
            content = f"{instruction}\n\n{_DOCUMENTS}\n\nQuestion: {_QUESTION}"
            return cls._around(text.render([{"role": "user", "content": content}]))

    @classmethod
    def _around(cls, whole: str) -> RagPrompt:
        """What a template wrote around the places of documents and question."""
        prefix, _, rest = whole.partition(_DOCUMENTS)
        middle, found, suffix = rest.partition(_QUESTION)
        if not found:
            raise InputError("the model's chat template leaves out the documents or the question")
        return cls(prefix, middle, suffix)

    def before(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The pieces between prefix and a document that stands behind these texts, as a prompt has them."""
        return tuple(piece for text in texts for piece in (text, self.separator))

    def render(self, documents: Sequence[str], question: str) -> str:
        """The prompt as the model is to see it."""
        return f"{self.prefix}{self.separator.join(documents)}{self.middle}{question}{self.suffix}"

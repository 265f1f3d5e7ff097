"""What all components of this integration share: an engine, named by how it is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_serializer

from kvrag import ConfigError, Engine
from kvrag.ingested import known_of
from kvrag.model import READER
from kvrag.prompt import RagPrompt
from kvrag.shared import EngineSettings, SharedEngine, shared_engine

# pydantic would look into the engine, and need not.
if TYPE_CHECKING:
    _Engine = Engine
else:
    _Engine = Any

TEMPLATE = "template"
_LOCAL = {"_share": None, "_chats": None}  # what does not travel


class EngineFields(BaseModel):
    """Fields that name an engine; not used by itself.

    Equal settings mean one engine in memory, which lives as long as one of its holders. Pickled, a component
    is its settings; the engine is loaded, or shared, when it is first needed on the other side.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: str = Field(default=READER, description="Folder or hub name of a decoder.")
    store: Any = Field(default=None, description="Folder of the caches, or a KVStore; None keeps nothing.")
    engine: _Engine | None = Field(
        default=None, exclude=True, repr=False, description="An engine, instead of the fields that make one."
    )
    device: str | None = Field(default=None, description="Where it computes; None: the GPU if there is one.")
    dtype: str = Field(default="auto", description="Of the weights.")
    max_length: int | None = Field(
        default=None, description="Longest prompt plus answer in tokens; None: the model's own limit."
    )
    codec: str = Field(default="raw", description="How caches are written: raw, fp8, int8 or int4.")
    model_options: dict[str, Any] = Field(
        default_factory=dict, description="More arguments of kvrag.Model.load, such as revision."
    )
    prefix: str = Field(
        default=TEMPLATE,
        description=(
            "What documents are encoded behind: 'template' (what the chat template writes before the first "
            "message's text), or a text, best the beginning that all prompts share."
        ),
    )

    _share: SharedEngine | None = PrivateAttr(default=None)

    def __init__(self, **fields: Any) -> None:
        """Check the settings.

        Raises:
            ConfigError: `engine` is none, or stands beside a setting that would make another one.
        """
        engine = fields.get("engine")
        if engine is not None and not isinstance(engine, Engine):
            raise ConfigError(f"engine is a {type(engine).__name__}; expected a kvrag.Engine")
        if engine is not None:
            made_by = {"model", "store", "device", "dtype", "max_length", "codec", "model_options"}
            if twice := sorted(made_by & set(fields)):
                raise ConfigError(
                    f"{twice[0]} is given beside engine; an engine has its own, give one of both"
                )
            fields = {**fields, "model": engine.model.name, "codec": engine.codec}
        super().__init__(**fields)

    @field_serializer("store")
    def _serialize_store(self, store: Any) -> str | None:
        return (
            None if store is None else str(store) if isinstance(store, (str, Path)) else type(store).__name__
        )

    @property
    def running(self) -> Engine:
        """The engine; loaded now if it is not yet.

        Raises:
            ConfigError: no such model here, damaged files, or an impossible setting.
            UnsupportedModel: a model that cannot be re-positioned exactly.
        """
        if self.engine is not None:
            return self.engine
        if self._share is None:
            self._share = shared_engine(
                EngineSettings(
                    model=self.model,
                    store=self.store,
                    device=self.device,
                    dtype=self.dtype,
                    max_length=self.max_length,
                    codec=self.codec,
                    options=tuple(sorted(self.model_options.items())),
                )
            )
            known_of(self._share.engine)
        return self._share.engine

    @property
    def document_prefix(self) -> str:
        """The text that documents are encoded behind."""
        return self.running.model.text.opening if self.prefix == TEMPLATE else self.prefix

    @property
    def form(self) -> RagPrompt:
        """The beginning of prompts that documents are encoded behind, and whether a template writes BOS."""
        return RagPrompt(self.document_prefix, is_rendered=self.running.model.text.has_template)

    def engine_fields(self) -> dict[str, Any]:
        """The same engine and prefix for another component."""
        if self.engine is not None:
            return {"engine": self.engine, "prefix": self.prefix}
        return {name: getattr(self, name) for name in EngineFields.model_fields if name != "engine"}

    def __getstate__(self) -> dict[Any, Any]:
        """The settings, without the engine.

        Raises:
            ConfigError: it was made with `engine`, which cannot travel.
        """
        if self.engine is not None:
            raise ConfigError("made with engine=..., this cannot be pickled; name model and store instead")
        # Not LlamaIndex's own: it drops with a warning what cannot be pickled, and we say so.
        state = BaseModel.__getstate__(self)
        return {**state, "__pydantic_private__": {**(state["__pydantic_private__"] or {}), **_LOCAL}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Take the settings; the engine is loaded when it is needed."""
        BaseModel.__setstate__(self, state)

"""Which conversation a call belongs to, as LangChain and LangGraph tell it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config

_IDS = ("thread_id", "session_id")
_NAMESPACE = "langgraph_checkpoint_ns"


def with_thread(config: RunnableConfig | None) -> RunnableConfig:
    """A configuration whose metadata say which thread it is.

    LangGraph puts the thread there itself. Outside of it, a call's own configuration, or the one of the chain
    that it is made in (`RunnableWithMessageHistory`), says it under "configurable", which models do not see.
    """
    full = ensure_config(config)
    named = full.get("configurable") or {}
    known = full.get("metadata") or {}
    told = {name: named[name] for name in _IDS if name in named and name not in known}
    if told:
        full["metadata"] = {**known, **told}
    return full


def thread_of(run_manager: Any) -> str | None:
    """The id of the conversation that a run belongs to; None: nothing names one.

    It is the `thread_id`, or else the `session_id`. A graph inside another one, also inside a tool, has
    conversations of its own: the names of the nodes around it follow the id.
    """
    metadata = (run_manager.metadata if run_manager else None) or {}
    found = next((metadata[name] for name in _IDS if metadata.get(name) not in {None, ""}), None)
    if found is None:
        return None
    around = str(metadata.get(_NAMESPACE) or "").split("|")[:-1]
    return "/".join([str(found), *(task.partition(":")[0] for task in around)])


class Threaded:
    """Calls that tell the model their thread also outside of LangGraph; stands before LangChain's base."""

    def _of_thread(self, config: RunnableConfig | None) -> RunnableConfig | None:
        """The configuration that a call goes on with."""
        raise NotImplementedError

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The answer; see LangChain's `Runnable`."""
        base: Any = super()
        return base.invoke(input, self._of_thread(config), **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The same without blocking the event loop."""
        base: Any = super()
        return await base.ainvoke(input, self._of_thread(config), **kwargs)

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """The answer piece by piece."""
        base: Any = super()
        found: Iterator[Any] = base.stream(input, self._of_thread(config), **kwargs)
        return found

    def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """The same without blocking the event loop."""
        base: Any = super()
        found: AsyncIterator[Any] = base.astream(input, self._of_thread(config), **kwargs)
        return found

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The answer as events."""
        base: Any = super()
        return base.stream_events(input, self._of_thread(config), **kwargs)

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The same without blocking the event loop."""
        base: Any = super()
        return base.astream_events(input, self._of_thread(config), **kwargs)

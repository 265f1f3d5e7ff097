"""Pictures of one's own runs: where an answer came from, what layers read, what chats keep, how long it took.

Needs `pip install 'kvrag[plots]'` (matplotlib, imported when something is drawn). Every function draws into
the `Axes` it is given, or into new ones, and returns them: titles, sizes and files are the caller's. Colours
can be told apart by people who confuse red and green, and stand out from a light and from a dark background
(`matplotlib.style.use("dark_background")`).

>>> from kvrag import plots
>>> axes = plots.ttft({"from caches": [(1, 0.02), (8, 0.03)], "full prefill": [(1, 0.05), (8, 0.4)]})
>>> axes.get_xlabel(), axes.get_ylabel()
('documents in the prompt', 'time to first token (ms)')
>>> axes.figure.savefig("ttft.svg")  # doctest: +SKIP
"""

from kvrag.plots.documents import answer
from kvrag.plots.layers import masses
from kvrag.plots.memory import memory
from kvrag.plots.places import segments
from kvrag.plots.times import ttft

__all__ = ["answer", "masses", "memory", "segments", "ttft"]

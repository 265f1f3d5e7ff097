"""A chat whose memory does not grow: python examples/chat.py [MODEL]; it goes on where it was left."""

import sys

from kvrag import Engine
from kvrag.memory.cascade import Cascade

MODEL = sys.argv[1] if len(sys.argv) > 1 else "kvrag/reader"

with Engine.from_pretrained(MODEL) as engine, engine.sessions("chats", Cascade(512)) as sessions:
    session = sessions["jane"]
    print(f"{session.num_turns} turns so far; say something (an empty line ends it)", file=sys.stderr)
    for line in sys.stdin:
        if not line.strip():
            break
        stream = session.stream(line.strip())
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        use = stream.answer.memory
        print(f"  [read {use.read} tokens; {use.remembered} of {use.said} are remembered]", file=sys.stderr)

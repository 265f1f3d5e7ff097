"""A whole RAG service in one file, with Python's own web server and no framework.

    python examples/one_file_rag.py notes/                            # then open the address that it prints
    python examples/one_file_rag.py notes/ --ask "Who leads it?"      # one question, no server
    curl -N -d "Who leads it?" http://127.0.0.1:8000/ask              # answers come piece by piece

It answers on this machine only: whoever lets others in puts a server with passwords and TLS before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kvrag import Corpus, Engine, KVRagError, ask
from kvrag.documents import load
from kvrag.home import Home, ingest
from kvrag.model import READER, quiet

PAGE = """<!doctype html><meta charset="utf-8"><title>Ask</title>
<form onsubmit="event.preventDefault(); send(this.question.value)">
<input name="question" size="60" autofocus> <button>Ask</button></form><pre id="answer"></pre>
<script>
async function send(question) {
  const reader = (await fetch("/ask", {method: "POST", body: question})).body.getReader();
  const out = document.getElementById("answer"), decoder = new TextDecoder();
  out.textContent = "";
  for (let part; !(part = await reader.read()).done;)
    out.textContent += decoder.decode(part.value, {stream: true});
}
</script>"""


def answer(engine: Engine, corpus: Corpus, home: Home, question: str) -> Iterator[str]:
    """The answer piece by piece, then what it rests on and what it cost."""
    asked = ask(engine, corpus, question, form=home.form(engine))
    try:
        yield from asked
        reply = asked.reply()
    finally:
        asked.cancel()  # if whoever asked has gone
    yield "\n\n" + "".join(f"{source.focus:5.0%}  {source.name}\n" for source in reply.sources)
    usage, seconds = reply.answer.usage, reply.answer.timing.first_token
    yield f"first token after {1e3 * seconds:.0f} ms; "
    yield f"{usage.cached_tokens} of {usage.prompt_tokens} tokens cached\n"


def handler(engine: Engine, corpus: Corpus, home: Home) -> type[BaseHTTPRequestHandler]:
    """What the server does with a request. Requests run side by side; the engine reads them together."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._start(200, "text/html; charset=utf-8")
            self.wfile.write(PAGE.encode())

        def do_POST(self) -> None:
            length = min(int(self.headers.get("Content-Length") or 0), 10_000)
            question = self.rfile.read(length).decode(errors="replace")
            pieces = answer(engine, corpus, home, question)
            try:
                first = next(pieces)  # what is wrong with a question shows before its first piece
            except KVRagError as error:
                self._start(400, "text/plain; charset=utf-8")
                self.wfile.write(f"{error}\n".encode())
                return
            self._start(200, "text/plain; charset=utf-8")
            try:
                for piece in (first, *pieces):
                    self.wfile.write(piece.encode())
                    self.wfile.flush()
            except ConnectionError:
                pieces.close()

        def _start(self, status: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()

    return Handler


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", nargs="+", type=Path, help="files or folders: .txt .md .pdf .jsonl")
    parser.add_argument(
        "--model", default=READER, help="any decoder with rotary positions, by name or folder"
    )
    parser.add_argument("--home", type=Path, default=Path(".kvrag"), help="folder of collection and caches")
    parser.add_argument("--ask", metavar="QUESTION", help="answer this, and end")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()

    quiet()
    home = Home(arguments.home)
    with Engine.from_pretrained(arguments.model, store=home.store()) as engine:
        report = ingest(home, engine, load(arguments.documents))  # reads only what is new
        print(f"{len(report.ids)} chunks, {report.added} of them read now", flush=True)
        with home.corpus(engine) as corpus:
            if arguments.ask is not None:
                print("".join(answer(engine, corpus, home, arguments.ask)), end="")
                return
            with ThreadingHTTPServer(("127.0.0.1", arguments.port), handler(engine, corpus, home)) as server:
                print(f"http://127.0.0.1:{server.server_port}", flush=True)
                server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except KVRagError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        pass

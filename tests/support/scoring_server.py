"""A server on this machine that scores responses, for tests of a reference behind HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from tether.reference import Reference
from tether.types import PairBatch, Response


@contextmanager
def scoring_server(reference: Reference) -> Iterator[str]:
    """While open, answers `[[prompt ids, response ids], ...]` with a list of log-probs for each; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            questions = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            responses = [Response(tuple(prompt), tuple(tokens)) for prompt, tokens in questions]
            try:
                answer = reference.log_probs(PairBatch.of_pairs([(response, response) for response in responses]))
            except Exception as error:
                self.send_error(500, type(error).__name__)
                return
            body = json.dumps([values.tolist() for values in answer.split()]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

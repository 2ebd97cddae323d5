"""An HTTP server for one model: OpenAI's API, metrics and a web page. Needs lillama[serve]."""

from lillama.serve.http.server import bind, make_server, serve

__all__ = ["bind", "make_server", "serve"]

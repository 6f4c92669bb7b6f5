"""`tether report --watch`: the page on the loopback, made anew when it is asked for, which browsers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tether.errors import ConfigError
from tether.redact import masked
from tether.report.compare import compare, read_runs
from tether.report.page import render
from tether.report.read import METRICS, read_run
from tether.report.render import page

SECONDS = 5
_HOST = "127.0.0.1"


def serve(run_folders: Sequence[Path | str], *, port: int = 0, say: Callable[[str], None]) -> None:
    """Serve the page of a run, or the comparison of several, until the user stops it.

    Args:
        run_folders: of runs that may go on; one that has logged nothing yet is waited for.
        port: of the loopback; 0 for a free one.
        say: takes one line with the address.

    Raises:
        ConfigError: there is no such folder, or the port is taken.
    """
    server = page_server(run_folders, port)
    say(f"The page is at http://{_HOST}:{server.server_port}/ and follows the run. Stop it with Ctrl-C.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def page_server(run_folders: Sequence[Path | str], port: int = 0) -> ThreadingHTTPServer:
    """The server, not started yet; see `serve`."""
    folders = [Path(folder) for folder in run_folders]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError(f"There is no folder {missing[0]!r}. Name the folder that a run writes (its `output`).")
    if len(folders) > 1:
        read_runs(folders)

    class Handler(BaseHTTPRequestHandler):
        """Answers with the page and nothing else, and only to who asked for this machine by name."""

        def do_GET(self) -> None:
            """Send the page."""
            # A page elsewhere whose name is made to lead here has another name in its request.
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if self.path != "/" or host not in (_HOST, "localhost"):
                self.send_error(404)
                return
            body = masked(current_page(folders)).encode("utf-8", "replace")
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Refresh", str(SECONDS))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of each request."""

    try:
        return ThreadingHTTPServer((_HOST, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {_HOST} cannot be used ({error.strerror}). Leave it out, or take another."
        ) from error


def current_page(folders: Sequence[Path]) -> str:
    """The page as the files are now; where they cannot be read, one that says why and is loaded again."""
    try:
        if len(folders) > 1:
            return compare(read_runs(folders))
        if not (folders[0] / METRICS).is_file():
            return _waiting(folders[0], "No log yet: the page comes with the first one.")
        return render(read_run(folders[0]))
    except ConfigError as error:
        return _waiting(folders[0], str(error))


def _waiting(folder: Path, words: str) -> str:
    return page("waiting.html", f"{folder.resolve().name} · Tether report", name=folder.resolve().name, words=words)

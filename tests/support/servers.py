"""The servers of a cluster, on this machine: S3 (moto), Ray with a token, PostgreSQL, MLflow.

Each is a context manager, which stops the server at its end.
"""

from __future__ import annotations

import logging
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

KEYS = {
    "AWS_ACCESS_KEY_ID": "of-a-test",
    "AWS_SECRET_ACCESS_KEY": "of-a-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
START = 90.0  # seconds that the start of a server may take
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def free_port() -> int:
    """Returns a port that no process listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Storage:
    """An S3 server that can refuse a `share` of its requests, and be down without losing its content."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.port, self.share, self.requests, self.refused, self.outages = free_port(), 0.0, 0, 0, 0
        # A request (its method and a part of its path) at which the server goes down, and for how many
        # seconds.
        self.leave_at: tuple[str, str, float] | None = None
        self.url = f"http://127.0.0.1:{self.port}"
        self._app = DomainDispatcherApplication(create_backend_app)
        self._chance, self._put = random.Random(0), threading.Lock()

    def __enter__(self) -> Storage:
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", self.port, self, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Answers or refuses a request."""
        self.requests += 1
        if (
            self.leave_at
            and environ["REQUEST_METHOD"] == self.leave_at[0]
            and self.leave_at[1] in environ["PATH_INFO"]
        ):
            threading.Thread(target=self.away, args=[self.leave_at[2]]).start()
            self.leave_at = None
        if self._chance.random() < self.share:
            self.refused += 1
            start_response("503 Service Unavailable", [("Content-Length", "0"), ("Connection", "close")])
            return [b""]
        # moto checks the condition of a put before the put, so puts must not overlap.
        with self._put if environ["REQUEST_METHOD"] == "PUT" else nullcontext():
            return self._app(environ, start_response)

    def away(self, seconds: float) -> None:
        """Stops the server for `seconds`."""
        self.__exit__()
        time.sleep(seconds)
        self.__enter__()
        self.outages += 1


@contextmanager
def process(
    *command: str, env: Mapping[str, str], log: Path, cwd: Path, user: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a server in a process group of its own."""
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, env=dict(env), stdout=file, stderr=file, cwd=cwd, start_new_session=True, user=user
        )
        try:
            yield server
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def wait_for(server: subprocess.Popen[bytes], answers: Callable[[], bool], log: Path) -> None:
    """Waits until a server answers. Fails with the end of its log if it does not."""
    end = time.monotonic() + START
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError):  # which it raises until the server is up
            if answers():
                return
        time.sleep(0.3)
    raise AssertionError(f"no answer\n{log.read_text()[-3000:]}")


def answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Returns True if a request for `url` succeeds."""
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=dict(headers or {})), timeout=5
    ) as response:
        return response.status == 200


@contextmanager
def ray_head(token: str, env: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Runs a Ray cluster of one node with 3 CPUs that requires `token`; yields its job server's address."""
    port, dashboard = free_port(), free_port()
    address, log = f"http://127.0.0.1:{dashboard}", folder / "ray.log"
    temporary = tempfile.mkdtemp(prefix="ray-")  # a short path, because Ray puts sockets into it
    options = {
        **{"--port": port, "--dashboard-host": "127.0.0.1", "--dashboard-port": dashboard, "--num-cpus": 3},
        **{"--object-store-memory": 2**28, "--temp-dir": temporary},
        # Another Ray on this machine may use the default ports. Without a port, the agent that starts jobs
        # fails.
        **{"--dashboard-agent-listen-port": free_port(), "--ray-client-server-port": free_port()},
    }
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        *map(str, sum(options.items(), ())),
    ]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        with process(*command, env={**env, **secret}, log=log, cwd=folder) as server:
            wait_for(
                server, lambda: answers(f"{address}/api/version", {"Authorization": f"Bearer {token}"}), log
            )
            yield address
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Postgres:
    """A PostgreSQL server that keeps its data when it stops and starts again; `url` is that of a database.

    If this process is root, the server runs as the user `postgres`, because it refuses to run as root.
    """

    def __init__(self, env: Mapping[str, str], folder: Path) -> None:
        self.port, self._env, self._log = free_port(), env, folder / "postgres.log"
        self.url = f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/postgres"
        self._user = "postgres" if os.getuid() == 0 else None
        self._process = ExitStack()

    def __enter__(self) -> Postgres:
        self._home = Path(tempfile.mkdtemp(prefix="postgres-"))
        if self._user is not None:
            os.chown(self._home, pwd.getpwnam(self._user).pw_uid, pwd.getpwnam(self._user).pw_gid)
        initdb = [
            POSTGRES[-1] / "initdb",
            "--auth=trust",
            "--username=mlflow",
            "--no-sync",
            "-D",
            self._home / "data",
        ]
        subprocess.run(initdb, user=self._user, check=True, capture_output=True, cwd=self._home)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def start(self) -> None:
        """Starts the server and waits until it listens."""
        program, data = str(POSTGRES[-1] / "postgres"), self._home / "data"
        options = map(
            str, ["-D", data, "-h", "127.0.0.1", "-p", self.port, "-k", self._home, "-c", "fsync=off"]
        )
        running = process(program, *options, env=self._env, log=self._log, cwd=self._home, user=self._user)
        self._server = self._process.enter_context(running)
        wait_for(
            self._server,
            lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() is None,
            self._log,
        )

    def stop(self) -> None:
        """Cuts all connections and stops the server."""
        self._server.send_signal(signal.SIGINT)  # SIGTERM would wait until all clients disconnect
        self._process.close()


@contextmanager
def mlflow_server(
    database: str, artifacts: str, env: Mapping[str, str], folder: Path, *extra: str
) -> Iterator[str]:
    """Runs MLflow's tracking server with `extra` options; yields its address."""
    port, log = free_port(), folder / "mlflow.log"
    options = {"--host": "127.0.0.1", "--port": port, "--workers": 1, "--backend-store-uri": database}
    command = [
        "-m",
        "mlflow",
        "server",
        *map(str, sum(options.items(), ())),
        "--artifacts-destination",
        artifacts,
        *extra,
    ]
    with process(
        sys.executable, *command, env={**env, "MLFLOW_DISABLE_TELEMETRY": "true"}, log=log, cwd=folder
    ) as server:
        wait_for(server, lambda: answers(f"http://127.0.0.1:{port}/health"), log)
        yield f"http://127.0.0.1:{port}"

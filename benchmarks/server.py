"""`vllm serve` in processes of its own, for benchmarks and tests."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import requests

ENVIRONMENT = {
    "VLLM_PLUGINS": "deltamem,deltamem_sessions",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # whatever an earlier test has set
    "HF_HUB_OFFLINE": "1",
}


class VllmServer:
    """Options are those of `vllm serve`; the log is appended to `log`; `environment` is added to what is there."""

    def __init__(self, model: Path, options: list[str], log: Path, environment: dict[str, str] | None = None):
        self.model, self.options, self.log = str(model), options, log
        self.environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | ENVIRONMENT | (environment or {})

    def start(self, patience: float = 400, progress: Callable[[float], None] | None = None) -> "VllmServer":
        """Returns once it answers. Raises RuntimeError with the end of its log if it ends or takes long.

        progress: is called often, with the seconds that have gone by.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model, "--port", str(port)]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*command, *self.options],
                stdout=log, stderr=log, env=self.environment, cwd=self.log.parent, start_new_session=True,
            )  # fmt: skip
        try:
            if not self._answers(patience, progress):
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")
        except BaseException:  # Ctrl-C, too: the server would go on alone
            self.kill()
            raise
        return self

    def _answers(self, patience: float, progress: Callable[[float], None] | None) -> bool:
        """Whether it does before it ends or patience does."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < patience and self.process.poll() is None:
            if progress:
                progress(waited)
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return True
            except requests.RequestException:
                time.sleep(0.3)
        return False

    def __enter__(self) -> "VllmServer":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """kill -9, of the API server and the engine at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def call(
        self, method: str, path: str, key: str | None = None, patience: float = 120, **options
    ) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return requests.request(method, self.url + path, headers=headers, timeout=patience, **options)

    def metrics(self) -> dict[str, float]:
        """The plugin's, by their names without prefix."""
        text = requests.get(f"{self.url}/metrics", timeout=30).text
        found = re.findall(r"^vllm:deltamem_(\w+?)(?:_total)?\{.*\} (\S+)$", text, re.M)
        return {name: float(value) for name, value in found}

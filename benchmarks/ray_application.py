"""The repository's serve.yaml, changed and running."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import psutil
import yaml

REPOSITORY = Path(__file__).parents[1]
PATIENCE = 600  # seconds, for the application to start


class Application:
    """`serve run` on the repository's serve.yaml, with changes; a context manager.

    `options` replace those of vLLM, `engine` updates those of the deployment Engine. Raises RuntimeError,
    after printing the end of the log, when the application does not come up.
    """

    def __init__(self, options: dict, engine: dict):
        config = yaml.safe_load((REPOSITORY / "serve.yaml").read_text())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            config["http_options"]["port"] = self.port = free.getsockname()[1]
        application = config["applications"][0]
        application["args"] = options
        (deployment,) = (d for d in application["deployments"] if d["name"] == "Engine")
        deployment |= engine
        if "num_replicas" in engine:
            del deployment["autoscaling_config"]
        self.replicas = engine.get("num_replicas") or deployment["autoscaling_config"]["min_replicas"]
        self.config = config

    def __enter__(self) -> "Application":
        self.folder = tempfile.TemporaryDirectory(prefix="deltamem-serve-")
        path, log = Path(self.folder.name, "serve.yaml"), Path(self.folder.name, "log")
        path.write_text(yaml.safe_dump(self.config))
        environment = os.environ | {
            "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [Path(sys.executable).with_name("serve"), "run", path]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        end, up = time.monotonic() + PATIENCE, set()
        while len(up) < self.replicas:
            if self.process.poll() is not None or time.monotonic() > end:
                print(*log.read_text(errors="replace").splitlines()[-60:], sep="\n")
                self.__exit__()
                raise RuntimeError("The application did not come up: its log ends above.")
            time.sleep(0.5)
            with suppress(OSError):
                up.add(self.ask_for_a_replica())
        return self

    def __exit__(self, *_) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in [self.process, *psutil.wait_procs(family, timeout=20)[1]]:
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self.folder.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask_for_a_replica(self) -> str:
        """The name of a replica, any of those that answer. Raises OSError when none does."""
        with urlopen(f"{self.url}/models", timeout=60) as response:
            return response.headers["x-deltamem-replica"]

    def engines(self) -> list[psutil.Process]:
        """The replicas' processes."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[0].startswith("ray::ServeReplica:deltamem:Engine"):
                    found.append(process)
        return found

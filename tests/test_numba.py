"""vLLM's CPU worker beside Numba, and Numba without a cache, in processes of their own: this one may be patched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from vllm_deltamem.kernels import rows

SCAN = """
import numba
from vllm.triton_utils import dispatcher
from vllm_deltamem.patches import cpu_numba
if {patched}:
    cpu_numba.apply()
dispatcher._rebind_kernels([(len, dispatcher.KernelOverride(len, len))])
"""


def scan(patched: bool) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SCAN.format(patched=patched)], capture_output=True, text=True)


def test_a_worker_starts_where_numba_is_loaded():
    done = scan(patched=True)
    assert done.returncode == 0, done.stderr


def test_the_patch_is_still_needed():
    assert "_lib_fn_wrapper" in scan(patched=False).stderr


def test_what_another_version_of_any_file_compiled_is_not_used(tmp_path):
    shutil.copytree(Path(rows.__file__).parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    ask = [sys.executable, "-c", "from kernels import rows; print(rows.half_bits._cache.cache_path)"]
    folders = []
    for _ in range(2):
        folders.append(subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, check=True).stdout)
        with open(tmp_path / "kernels" / "pairs.py", "a") as file:
            file.write("# another version\n")
    assert len(set(folders)) == 2 and str(tmp_path) in folders[0]


def test_without_its_own_folder_the_cache_is_in_the_users(tmp_path):
    """Not in one that Numba chooses, which is the same for all versions."""
    shutil.copytree(Path(rows.__file__).parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "__pycache__").touch()  # even root can't make a folder there
    ask = [sys.executable, "-B", "-c", "from kernels import rows; print(rows.half_bits._cache.cache_path)"]
    found = []
    for home in (tmp_path, "/dev/null"):
        environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(tmp_path)}
        found.append(subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, env=environment))
    assert found[0].stdout.startswith(f"{tmp_path}/.cache/deltamem/")
    assert found[1].stdout == "None\n", found[1].stderr


def test_without_a_folder_to_write_to_every_process_compiles_anew():
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
from vllm_deltamem.kernels import rows
assert rows.half_bits(1.0) == 0x3C00
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Which weights a model was loaded with, told from samples of its files: to hash all of them would take long."""

import hashlib
from functools import lru_cache
from pathlib import Path

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
STRIDE = 1 << 20  # bytes from one sample to the next: every tensor of weight has some
SAMPLE = 64  # bytes


@lru_cache
def weights_digest(model: str) -> str:
    """Names the weight files of a model's folder, or its one file; 'none' where there are none, as for a hub's name.

    Another training, precision or merged adapter is another digest; a copy of the files is the same. Raises OSError
    where they cannot be read.
    """
    place = Path(model)
    files = [place] if place.is_file() else sorted(p for p in place.glob("*") if p.suffix in SUFFIXES)
    state = hashlib.blake2b(digest_size=16)
    for path in files:
        state.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb", buffering=0) as file:
            for start in range(0, path.stat().st_size, STRIDE):
                file.seek(start)
                state.update(file.read(SAMPLE))
    return state.hexdigest() if files else "none"

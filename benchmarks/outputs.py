"""Raw outputs on disk, one file per suite: a rerun of the same plan goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from .suites import Sample
from .suites.sample import Outputs

FOLDER = Path(__file__).parent / "raw"


def fingerprint(*parts) -> str:
    """Eight hexadecimal digits that change with any of the parts; a folder counts as its code and weights."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for path in sorted(p for p in part.rglob("*") if p.suffix in (".py", ".safetensors")):
                digest.update(path.name.encode() + path.read_bytes())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:8]


def folder(*names: str) -> Path:
    """A folder for raw outputs that git does not see."""
    path = FOLDER.joinpath(*names)
    path.mkdir(parents=True, exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    return path


def prompts(sample: Sample, outputs: Outputs) -> Iterator[list[int]]:
    """The prompts that these outputs answer."""
    return (sample.prompt(outputs[:i]) for i in range(len(outputs)))


def digest(sample: Sample, outputs: Outputs) -> str:
    return fingerprint(list(prompts(sample, outputs)))


def keep(path: Path, sample: Sample, outputs: Outputs) -> None:
    record = {"seed": sample.seed, "prompts": digest(sample, outputs), "outputs": outputs}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def kept(path: Path, samples: list[Sample]) -> dict[int, Outputs]:
    """seed -> outputs of the samples that have been run, as long as their prompts are still the same."""
    by_seed = {sample.seed: sample for sample in samples}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        sample = by_seed.get(record["seed"])
        if sample and digest(sample, record["outputs"]) == record["prompts"]:
            found[sample.seed] = record["outputs"]
    return found

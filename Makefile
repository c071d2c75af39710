# Short names for developers; the two scripts do the work.
PYTHON ?= .venv/bin/python
BIN := $(dir $(PYTHON))

.PHONY: fmt check test fuzz docs bench requirements

fmt:
	$(BIN)ruff format .
	$(BIN)ruff check --fix .

check:
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(BIN)mypy
	$(BIN)lint-imports

test:
	./test.sh

# The launcher's socket, the policy's reader and compiler, for as long as it takes (half an hour).
fuzz:
	HYPOTHESIS_PROFILE=long $(PYTHON) scripts/contained.py $(PYTHON) -m pytest -q --timeout 7200 \
		tests/agent/launcher/test_socket.py tests/agent/launcher/test_policy.py \
		tests/agent/launcher/test_seccomp.py tests/kit/test_policy.py tests/kit/test_lines.py

docs:
	$(BIN)sphinx-build -W -q -b html docs docs/_build/html

bench:
	./bench.sh

# Pins of everything that is installed, with hashes; run after changing dependencies.
UV_COMPILE := $(BIN)uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --upgrade pyproject.toml

requirements:
	$(UV_COMPILE) --group build -o requirements/runtime.txt
	$(UV_COMPILE) --group build --group lint --group test --group docs --group bench \
		-o requirements/dev.txt
	$(UV_COMPILE) --extra jupyter --group jupyter --group build -o requirements/jupyter.txt
	! grep -nE '://|^-|file:' requirements/*.txt

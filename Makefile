# make quickstart   installs into .venv, runs the quickstart notebook into out/
# make test         installs into .venv, checks and runs everything in the smoke preset
# make docs         builds the site into out/docs/html from the notebooks as they are, and checks its links
# make test-browser the tutorials in JupyterLab and Chromium, pictures into out/browser
# make paper        every table and figure into out/paper/<preset>; PRESET=smoke, mini or paper; ONLY="table_2 figure_1" runs some
# make rehearse     the same in the code of the paper preset, tiny, against a stand-in for the Hub, into out/rehearsal; ONLY=… some
PYTHON ?= python3
VENV ?= .venv
# auto: PyTorch's CPU builds where no NVIDIA GPU is found; none: pip's usual indexes; or the address of an index
TORCH_INDEX ?= auto
PRESET ?= $(or $(DMIN_PRESET),mini)
# notebooks of `make paper`, such as "table_2 figure_1"; all by default
ONLY ?=
# the retraining benchmark that `make benchmark` makes, or goes on with: digits, clipart or prompts
NAME ?= digits
# notebooks and tests that run at the same time, one thread each
JOBS ?= 2

# comes with PyTorch's builds for GPUs; beside others it interprets and compiles the kernel of dmin.core.gpu in tests
TRITON := "triton==3.9.0; sys_platform == 'linux'"

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
export JUPYTER_PREFER_ENV_PATH = 1
unexport MPLBACKEND

.PHONY: help install quickstart docs paper rehearse test test-browser wheels archive lock container benchmark keep export notebooks address readme clean
help:
	@echo 'quickstart  install, run nbs/tutorials/quickstart.ipynb into out/'
	@echo 'docs        install, build the site into out/docs/html, check its links; runs no notebook'
	@echo 'paper       install, run nbs/paper in PRESET=$(PRESET) into out/paper/$(PRESET), sum up; ONLY="table_2 …" runs some'
	@echo 'rehearse    install, run the code of PRESET=paper in small, without the Hub, into out/rehearsal; ONLY="table_2 …" some'
	@echo 'test        install, check the notebooks, run each in the smoke preset, and the tests'
	@echo 'test-browser  install, run the tutorials in JupyterLab in Chromium; pictures in out/browser'
	@echo 'wheels      build dmin and dmin_data into dist/'
	@echo 'archive     the release in dist/: repository, wheels, checksums'
	@echo 'lock        write requirements.lock from constraints.txt'
	@echo 'container   build the image of Containerfile, by podman'
	@echo 'benchmark   install, make what is missing of the retraining benchmark NAME=$(NAME) in JOBS processes'
	@echo 'export      write dmin/ from the notebooks'
	@echo 'notebooks   run all notebooks in place in the $(PRESET) preset, keep their outputs'
	@echo 'keep        take the results of runs over into results/$(PRESET); ONLY="table_2 …" some'
	@echo 'address     set GIT_URL=, SITE=, AUTHOR= and EMAIL=, those that are given, everywhere'
	@echo 'readme      write README.md from nbs/index.ipynb'
	@echo 'clean       remove what runs made (the environment in $(VENV) stays)'

install: $(INSTALLED)

# What runs $(1) is told to do if it is older: $(2).
define new_enough
@found="$$($(1) -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))')" || \
  { echo "$(1) is Python $${found:-that does not run}, and 3.11 or newer is needed: $(2)" >&2; exit 1; }
endef
WITH_NEWER := make PYTHON=python3.11 $(MAKECMDGOALS)

# Runs again only when what is to be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt tests/peers.txt
	$(if $(wildcard $(PY)),$(call new_enough,$(PY),rm -r $(VENV) and then $(WITH_NEWER)),$(call new_enough,$(PYTHON),$(WITH_NEWER)))
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	options="$$($(PY) tools/torch_index.py '$(TORCH_INDEX)')" && \
	  $(PY) -m pip install --progress-bar off $$options -e '.[dev]' -c constraints.txt
	$(PY) -m pip install --progress-bar off --no-deps -r tests/peers.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --progress-bar off --no-deps $(TRITON)
	touch $@

quickstart: $(INSTALLED)
	DMIN_PRESET=$(PRESET) $(PY) tools/run_notebook.py nbs/tutorials/quickstart.ipynb --output out/quickstart.ipynb

docs: $(INSTALLED)
	$(PY) -m pip install --progress-bar off -e '.[docs]' -c constraints.txt
	$(PY) tools/make_docs.py

paper: $(INSTALLED)
	DMIN_PRESET=$(PRESET) $(PY) tools/run_paper.py $(ONLY)

rehearse: $(INSTALLED)
	$(PY) tools/rehearse.py $(ONLY)

test: export DMIN_PRESET = smoke
test: export DMIN_OUT = $(CURDIR)/out/smoke
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: export DMIN_REQUIRE_PEERS = 1
test: $(INSTALLED)
	$(PY) tools/check_notebooks.py
	$(PY) tools/forked.py $(PY) -m pytest \
	  --tx '$(JOBS)*popen//python={python}' --max-worker-restart 8 --dist worksteal \
	  --nbmake --nbmake-timeout=900 --durations=20 --ignore tests/browser nbs tests

test-browser: export DMIN_PRESET = smoke
test-browser: export DMIN_OUT = $(CURDIR)/out/smoke
test-browser: export HF_HUB_OFFLINE = 1
test-browser: export OMP_NUM_THREADS = 1
test-browser: $(INSTALLED)
	$(PY) -m pip install --progress-bar off -e '.[dev,browser]' -c constraints.txt
	$(PY) tools/forked.py $(PY) -m pytest -n $(JOBS) --durations=5 tests/browser

wheels: $(INSTALLED)
	$(PY) tools/make_wheels.py

archive: $(INSTALLED)
	$(PY) tools/make_archive.py

lock: $(INSTALLED)
	$(PY) -m pip install --progress-bar off uv
	$(PY) tools/make_lock.py

container:
	podman build -t dmin .

benchmark: export OMP_NUM_THREADS = 1
benchmark: $(INSTALLED)
	$(VENV)/bin/torchrun --nproc-per-node $(JOBS) tools/make_benchmark.py $(NAME)
	$(PY) tools/make_benchmark.py $(NAME) --scores
	$(VENV)/bin/torchrun --nproc-per-node $(JOBS) tools/make_benchmark.py $(NAME) --without
	$(PY) tools/make_benchmark.py $(NAME) --pack

export: $(INSTALLED)
	$(VENV)/bin/nbdev_export

notebooks: $(INSTALLED)
	DMIN_PRESET=$(PRESET) $(PY) tools/run_notebook.py --inplace nbs
	$(VENV)/bin/nbdev_clean

keep: $(INSTALLED)
	DMIN_PRESET=$(PRESET) $(PY) tools/keep_results.py $(ONLY)

# an option for a variable of the command line; one of the environment, such as EMAIL, does not count
given = $(if $(filter command%,$(origin $(1))),$(2) '$(subst ','\'',$($(1)))')
address: $(INSTALLED)
	$(PY) tools/set_address.py $(call given,GIT_URL,--git-url) $(call given,SITE,--site) \
	  $(call given,AUTHOR,--author) $(call given,EMAIL,--email)

readme: $(INSTALLED)
	$(PY) tools/make_readme.py

clean:
	rm -rf out runs _proc _docs build dist .pytest_cache
	find . \( -path ./$(VENV) -o -path ./.git \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -path './nbs/*/runs' -o -path ./nbs/runs \) -prune -exec rm -rf {} +

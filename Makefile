# Each target sets up what it needs, once, in .venv: a fresh machine needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

.PHONY: help serve test test-gpu test-long check aot conformance families stamp parity stalls fuzz tables soak \
        bench-cpu bench-frontend bench-gpu bench-kernels bench-shapes bench-static clean operations simulate
.DEFAULT_GOAL := help

help:
	@echo 'make serve ARGS="serve MODEL --port 8000"   serve a model; without ARGS a small demo model'
	@echo 'make test ARGS="tests/engine -k radix"      run the tests; without ARGS all of them'
	@echo 'make test-long                              the tests that it leaves out for their time'
	@echo 'make test-gpu                               the tests that need a GPU, and the kernels natively'
	@echo 'make check                                  ruff, mypy and the layout tests'
	@echo 'make aot                                    what each kernel costs on each GPU, and whether that is more than before'
	@echo 'make tables                                 write the tables of the README again'
	@echo 'make fuzz                                   over 10,000 requests at random, as openapi.json describes them'
	@echo 'make stamp                                  a million random steps on the stamp device'
	@echo 'make families                               logits of every family compared with transformers, and loading times'
	@echo 'make operations                             a million random operations on the scheduler, checked one by one'
	@echo 'make simulate                               admission policies side by side on a simulated GPU'
	@echo 'make conformance                            constrained answers of the demo model validate against their JSON schemas'
	@echo 'make parity                                 tokens compared with those of transformers'
	@echo 'make stalls                                 huge requests must not hold up the others'
	@echo 'make soak                                   half an hour of abuse in minutes: what a server holds has to stay flat'
	@echo 'make bench-frontend                         CPU time of the server for each token that it streams'
	@echo 'make bench-cpu                              speed of the demo model on this CPU'
	@echo 'make bench-gpu                              the server on this GPU beside vLLM on an H100'
	@echo 'make bench-shapes                           the server with six well-known shapes, beside their floors'
	@echo 'make bench-kernels                          each GPU operation beside its floor on this GPU'
	@echo 'make bench-static                           one step of a model on this GPU, by kind of operation'
	@echo 'make clean                                  remove $(VENV)'
	@echo 'PYTHON=python3.12 names another interpreter for $(VENV)'

serve: $(VENV)/.serve
	$(RUN) -m aiollm $(ARGS)

# A file's tests share servers: they run one after the other, beside those of other files.
test: $(VENV)/.test
	$(RUN) -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile $(ARGS)

test-long: $(VENV)/.test
	$(RUN) -m pytest -m long $(ARGS)

check: $(VENV)/.check
	$(RUN) tools/check

aot: $(VENV)/.test
	$(RUN) -m aiollm.kernels.aot --limits tests/kernels/limits.json $(ARGS)

stamp: $(VENV)/.test
	$(RUN) tests/stamp.py --steps 1000000 --save tools/results/stamp.json

tables: $(VENV)/.serve
	$(RUN) tools/models.py
	$(RUN) tools/endpoints.py
	$(RUN) tools/flags.py

fuzz: $(VENV)/.test
	PYTHONPATH=tests:tools $(RUN) tests/fuzz.py $(ARGS)

stalls: $(VENV)/.test
	$(RUN) -m pytest -m timing -s $(ARGS)

bench-cpu: $(VENV)/.serve
	$(RUN) tools/bench_cpu.py --save tools/results/bench_cpu.json $(ARGS)

families: $(VENV)/.test
	PYTHONPATH=tests $(RUN) tests/family_table.py --save tools/results/families.json $(ARGS)
	$(RUN) tools/models.py

operations: $(VENV)/.test
	PYTHONPATH=tools $(RUN) tests/operations.py --operations 1000000 --save tools/results/operations.json

simulate: SEEDS := 1 2 3 4 5 6
simulate: LOADS := decode-heavy balanced prefill-heavy reasoning
simulate: RIVALS := optimum past-future conservative aggressive
simulate: $(VENV)/.test
	$(RUN) tools/simulate.py --save simulate_artifact artifact
	$(RUN) tools/simulate.py --save simulate_serve serve --seeds $(SEEDS) --workloads $(LOADS) chats bursts drift
	$(RUN) tools/simulate.py --save simulate_serve_steady serve --seeds $(SEEDS) --policies $(RIVALS) --warm_up 240
	$(RUN) tools/simulate.py --save simulate_serve_impatient serve --seeds $(SEEDS) --policies $(RIVALS) --impatient

parity: $(VENV)/.test
	$(RUN) tools/parity.py --save tools/results/parity.json $(ARGS)

conformance: $(VENV)/.test
	$(RUN) tools/conformance.py --save tools/results/conformance.json $(ARGS)

soak: $(VENV)/.test
	$(RUN) tools/soak.py --save tools/results/soak.json $(ARGS)

bench-frontend: $(VENV)/.test
	$(RUN) tools/bench_frontend.py --save tools/results/bench_frontend.json $(ARGS)

bench-gpu: $(VENV)/.serve
	$(RUN) tools/bench_gpu.py --save tools/results/bench_gpu.json $(ARGS)

bench-shapes: $(VENV)/.serve
	$(RUN) tools/bench_shapes.py --save tools/results/bench_shapes.json $(ARGS)

test-gpu: $(VENV)/.serve $(VENV)/.test
	$(RUN) tools/gpu_tests.py --save tools/results/gpu_tests.json $(ARGS)

bench-kernels: $(VENV)/.serve
	$(RUN) -m aiollm.kernels.bench --save tools/results/bench_kernels.json $(ARGS)

bench-static: $(VENV)/.serve
	$(RUN) -m aiollm bench static --save tools/results/bench_static.json $(ARGS)

clean:
	rm -rf $(VENV)

# .venv/.test stands for "the extra `test` is installed"; .serve needs no extra.
$(VENV)/.%: setup.cfg pyproject.toml constraints.txt tools/install
	PYTHON="$(PYTHON)" tools/install $(VENV) $(filter-out serve,$*)
	@touch $@

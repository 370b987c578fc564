# The only list of commands. Everything is installed into .venv and .local-stack of this folder.
#   make demo [KEEP=1] [RECORD=1] [KAFKA_HOME=...]
#                                         the main job on real data and real servers
#   make test [TEST_PROCESSES=n]          every test, against the real servers; each process has its own
#   make sim [SEED=n]                     simulated crashes, zombies, restores: 10,000 seeds
#   make faults [FAULTS=name,...] [EVENTS=n] [RECORD=1] [KAFKA_HOME=...]
#                                         real kills, zombies, restores: state stays exact
#   make faults-publish [CASES=name,...] [RECORD=1] [KAFKA_HOME=...]
#                                         publications broken at every step: the old version answers
#   make parity [PAIRS=n] [DATA=folder] [RECORD=1] [KAFKA_HOME=...]
#                                         what online reads return equals what the lake gives
#   make bench-ingest, bench-freshness, bench-replay, bench-memory [RECORD=1] [EVENTS=n]
#        bench-pit, bench-read [ROUNDS=n], bench-compact [USERS=n]
#                                         measured; RECORD=1 keeps it under benchmarks/results
#   make bench-score [RECORD=1] [ROUNDS=n] [LIFETIMES=a,b,...] [TRAIN_S=n]
#                                         an answer's time by lifetime; the indexer against full
#   make bench-train [RECORD=1]           tokens/s of training, against stock PyTorch layers; MFU
#   make bench-publish [RECORD=1] [RATE=n] [VERSIONS=n]
#                                         ten versions published and two rolled back under load
#   make bench-quality SET=... [SEEDS=n] [PROTOCOL=...] [MODELS=...] [BUDGET_S=n] [DATA=folder]
#                                         which model ranks best: docs/quality.md says how
#   make bench-staleness [RECORD=1] [SERVED=gems|gems_no_sources] [DATA=folder]
#                                         once, daily, six-hourly trained; frozen and live state
#   make quality-pages                    tables and plots of those results into docs/results
#   make check                            format, lint, types, import contracts (under 60 s)
#   make figures                          benchmarks/results into README.md
#   make up / make down                   the local stack by itself
# TORCH_SPEC chooses another build of torch: see "Choosing a CUDA build" in the README.
PYTHON ?= python3.11
TORCH_SPEC ?= torch==2.13.0
# Tests wait for servers more than they compute.
TEST_PROCESSES ?= 3
KEEP ?=
RECORD ?=
SEED ?=
PAIRS ?= 2000
DATA ?= ../shared/data
SET ?= complete_journey
SEEDS ?= 1
MODELS ?= default
SERVED ?= gems
BIN := .venv/bin

.PHONY: demo test sim faults parity bench-ingest bench-freshness bench-replay bench-memory
.PHONY: faults-publish bench-publish
.PHONY: bench-pit bench-read bench-score bench-compact bench-train bench-quality
.PHONY: bench-staleness quality-pages check format figures up down clean

demo: .venv/stamp-local
	$(BIN)/moveline demo $(if $(KEEP),--keep) $(if $(RECORD),--record)

test: .venv/stamp-dev
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: .venv/stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/stamp-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One seed to repeat it, or the ten thousand that have to pass.
sim: .venv/stamp-dev
	$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED),--seeds 0:10000)

# Every fault on real processes; SEED chooses the moments.
faults: .venv/stamp-local
	$(BIN)/python -m benchmarks.faults $(if $(RECORD),--record)

# Publications killed and broken in every way, while somebody asks.
faults-publish: .venv/stamp-local
	$(BIN)/python -m benchmarks.faults_publish $(if $(RECORD),--record)

# Reads taken while real events flow, judged by the lake afterwards: not one value may differ.
parity: .venv/stamp-dev
	$(BIN)/python -m tests.parity --pairs $(PAIRS) --data $(DATA) $(if $(RECORD),--record)

bench-ingest: .venv/stamp-local
	$(BIN)/python -m benchmarks.bench_ingest $(if $(RECORD),--record)

# matplotlib, which draws its curve, comes with the tools of development.
bench-freshness: .venv/stamp-dev
	$(BIN)/python -m benchmarks.bench_freshness $(if $(RECORD),--record)

bench-replay: .venv/stamp-local
	$(BIN)/python -m benchmarks.bench_replay $(if $(RECORD),--record)

bench-pit: .venv/stamp-local
	$(BIN)/python -m benchmarks.bench_pit $(if $(RECORD),--record)

# matplotlib, which draws its curve, comes with the tools of development.
bench-memory: .venv/stamp-dev
	$(BIN)/python -m benchmarks.bench_memory $(if $(RECORD),--record)

bench-read: .venv/stamp-local
	$(BIN)/python -m benchmarks.bench_read $(if $(RECORD),--record)

bench-compact: .venv/stamp-local
	$(BIN)/python -m benchmarks.bench_compact $(if $(RECORD),--record)

bench-train: .venv/stamp-local
	$(BIN)/python -m benchmarks.bench_train $(if $(RECORD),--record)

bench-score: .venv/stamp-local
	$(BIN)/python -m benchmarks.bench_score $(if $(RECORD),--record)

bench-publish: .venv/stamp-local
	$(BIN)/python -m benchmarks.bench_publish $(if $(RECORD),--record)

# One file a model and seed: a run that was stopped goes on where it was.
bench-quality: .venv/stamp-dev
	DATA=$(DATA) $(BIN)/python -m benchmarks.bench_quality --set $(SET) --seeds $(SEEDS) \
	  --models $(MODELS) $(if $(PROTOCOL),--protocol $(PROTOCOL)) \
	  $(if $(BUDGET_S),--budget-s $(BUDGET_S))

# One file an arm and training: a run that was stopped goes on where it was.
bench-staleness: .venv/stamp-dev
	DATA=$(DATA) $(BIN)/python -m benchmarks.bench_staleness --served $(SERVED) \
	  $(if $(RECORD),--record)

quality-pages: .venv/stamp-dev
	$(BIN)/python -m benchmarks.quality_pages

figures: .venv/stamp-local
	$(BIN)/python -m benchmarks.readme

up: .venv/stamp-local
	$(BIN)/moveline up

down:
	$(BIN)/moveline down

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "moveline needs Python 3.11 (tritonserver of the local stack embeds it) and found no" \
	       "$(PYTHON): install it, or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# A stamp is written last, so an interrupted install starts over; pip then reuses what is there.
.venv/stamp-local: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet "$(TORCH_SPEC)"
	$(BIN)/pip install --quiet --editable ".[local]"
	$(BIN)/python -m compose.local.install
	touch $@

.venv/stamp-dev: .venv/stamp-local
	$(BIN)/pip install --quiet --editable ".[local,dev]"
	touch $@

clean:
	rm -rf .venv .local-stack .moveline build *.egg-info

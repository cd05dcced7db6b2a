# Outrigger's targets. Each says what it does and is safe to repeat. `make help` lists them.

CARGO ?= cargo
ONCE ?=
CONSUL ?=
QUICK ?=
UPDATE ?=
FUZZ ?= 20
KEEP ?=
STOP ?=
FULL ?=
BENCH ?=
ARCH ?=
TAG ?=
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
BIN := target/debug
# What is built for development is always built for the whole workspace with what its tests ask of the libraries (which is what
# naming one test does): cargo unites features over what it is asked for, so another choice is another build of most of them.
BUILD := $(CARGO) build --locked --workspace --bins --test harness
TEST := $(CARGO) test --locked --workspace
# Static binaries: they run on any Linux of this architecture, and in an image without anything else.
STATIC := RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --release --target $(HOST)

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: need-rust need-go need-cc need-curl need-node need-python need-valgrind need-buildah
need-rust:
	@command -v $(CARGO) >/dev/null || { echo "make: Rust is missing: install it from https://rustup.rs" >&2; exit 1; }
need-cc:
	@command -v cc >/dev/null || { echo "make: a C compiler is missing (the TLS library needs one): apt-get install gcc" >&2; exit 1; }
need-go:
	@command -v go >/dev/null || { echo "make: Go is missing (the tests build a real Consul and Kubernetes with it): install it from https://go.dev/dl" >&2; exit 1; }

need-python:
	@python3 -c 'import ensurepip, venv' 2>/dev/null || { echo "make: Python 3 with venv and pip is missing (the tests run its gRPC as a peer): apt-get install python3-venv" >&2; exit 1; }
need-valgrind:
	@command -v valgrind >/dev/null || { echo "make: valgrind is missing: apt-get install valgrind" >&2; exit 1; }
need-node:
	@[ "$$(id -u)" = 0 ] || { echo "make: a Kubernetes node needs root" >&2; exit 1; }
	@missing=; for one in containerd:containerd runc:runc nft:nftables ip:iproute2 curl:curl; do \
		command -v $${one%:*} >/dev/null || missing="$$missing $${one#*:}"; done; \
	[ -x /usr/lib/cni/bridge ] || missing="$$missing containernetworking-plugins"; \
	[ -z "$$missing" ] || { echo "make: a Kubernetes node needs more of Debian: apt-get install$$missing" >&2; exit 1; }
need-curl:
	@command -v curl >/dev/null || { echo "make: curl is missing (the tests' unchanged client): apt-get install curl" >&2; exit 1; }

need-buildah:
	@command -v buildah >/dev/null || { echo "make: buildah is missing: apt-get install buildah" >&2; exit 1; }

.PHONY: build
build: need-rust need-cc ## Build the three binaries for development (target/debug)
	$(BUILD)

.PHONY: release
release: need-rust need-cc ## Build the three static binaries (target/<host>/release)
	$(STATIC) -p outrigger -p outrigger-controller -p outrigger-proxy

.PHONY: image
image: need-rust need-cc need-buildah ## Build the three images (ARCH=arm64: for that machine; TAG=: another tag than the version)
	@charts/images.sh $(if $(ARCH)$(TAG),"$(ARCH)" "$(TAG)")

.PHONY: demo
demo: build ## Run the mesh on this machine, no root needed (ONCE=1: headless; CONSUL=1: on a real Consul)
	@if [ -n "$(CONSUL)" ]; then $(MAKE) --no-print-directory tools; fi
	$(BIN)/outrigger demo $(if $(ONCE),--once) $(if $(CONSUL),--consul target/tools/consul)

.PHONY: tools
tools: need-go need-python ## Build the tests' real servers and independent clients from pinned Go modules and PyPI
	@e2e/tools/build.sh

.PHONY: quick
quick: lint ## The inner loop: lint, unit and property tests
	$(CARGO) test --locked --workspace --exclude outrigger-e2e

.PHONY: test
test: need-rust need-cc need-go need-python need-curl tools build ## All tests that need no root: unit, property, namespaces, a real Consul, a real Kubernetes API
	$(TEST)
	$(BIN)/outrigger demo --once

# What uids change: who is exempt from redirection, whose files are whose. The other suites would see the same again.
ROOT_SUITES := harness transparency wire identity lifecycle cni conformance postgres

.PHONY: test-root
test-root: need-rust need-cc need-go need-python need-curl tools build ## The suites that need several uids or Debian's servers (root)
	@[ "$$(id -u)" = 0 ] || { echo "make: test-root needs root" >&2; exit 1; }
	OUTRIGGER_ROOT_SUITES=1 $(TEST) $(ROOT_SUITES:%=--test %)

.PHONY: tools-node
tools-node: need-go ## Build what a Kubernetes node is made of, and the Gateway API's conformance suite
	@e2e/tools/build.sh api node conformance

NODE_SUITES := kubernetes_node kubernetes_readme kubernetes_conformance kubernetes_mesh
# `cargo` takes these only by their names (e2e/Cargo.toml).
NAMED_SUITES := $(NODE_SUITES) postgres

.PHONY: kubernetes
ifdef STOP
kubernetes: ## Suites on a real Kubernetes node (root; FULL=1: at full length; KEEP=1: leave a node up to work with; STOP=1: take it down)
	$(BIN)/e2e-node stop
else ifdef KEEP
kubernetes: need-rust need-cc need-go need-node tools-node build
	OUTRIGGER_ROOT_SUITES=1 $(BIN)/e2e-node keep
else
kubernetes: need-rust need-cc need-go need-node tools-node build
	@$(BIN)/e2e-node stop
	OUTRIGGER_ROOT_SUITES=1 $(if $(FULL),OUTRIGGER_SOAK=1) $(TEST) $(NODE_SUITES:%=--test %)
endif

.PHONY: soak
soak: tools build ## The suites at full length
	OUTRIGGER_SOAK=1 $(TEST)

.PHONY: figures
figures: build ## Print what the suites measured, as one table
	@$(BIN)/figures

.PHONY: bench
bench: release ## Measure the mesh beside HAProxy, Envoy and nginx (QUICK=1: five minutes; else about an hour)
	$(STATIC) -p outrigger-e2e --bin bench
	@e2e/tools/envoy.sh || echo "make: bench goes on without Envoy" >&2
	@[ -x /usr/sbin/haproxy ] && [ -e /usr/lib/nginx/modules/ngx_stream_module.so ] || \
		echo "make: bench goes on without what is missing of these: apt-get install haproxy nginx libnginx-mod-stream" >&2
	target/$(HOST)/release/bench $(if $(QUICK),--quick) $(BENCH)

.PHONY: instructions
instructions: need-rust need-cc need-valgrind ## Count the instructions of codecs and of one request (UPDATE=1: keep the figures)
	UPDATE=$(UPDATE) $(CARGO) bench --locked -p outrigger-proxy --bench instructions

.PHONY: fuzz
fuzz: need-rust need-cc ## Fuzz each codec for a while (FUZZ=20: seconds for each)
	@e2e/tools/fuzz.sh $(FUZZ)

.PHONY: fmt
fmt: ## Format the code
	$(CARGO) fmt --all

.PHONY: lint
lint: need-rust ## Formatting and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --workspace $(NAMED_SUITES:%=--test %) -- -D warnings

.PHONY: deny
deny: ## Licences, bans and sources of every dependency (needs cargo-deny)
	$(CARGO) deny --locked check bans licenses sources

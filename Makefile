# wayout: everything a developer runs. `make help` lists it.

GO       ?= go
PREFIX   ?= /usr/local
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -X main.version=$(VERSION)
FUZZTIME ?= 60s
CLANG    ?= clang-14
STRIP    ?= llvm-strip-14
VMKERNEL ?= linux-image-cloud-amd64
VMTESTS  ?= bpf=^Test(Divert|Fragments|Responder|SharedPrefix|Pin|GuardOutlives|SetPath|LeastRights) netcfg=Ingress \
            cmd/wayout=^Test(Transparent|TransparentFailsClosed|TransparentFragments|ListenOnPrefix|PrefixNeighbours|TwoUplinks|GuardOutlivesDaemon|PlanApplyClean|ServeMakesAndCleans)$$

.PHONY: help build demo test soak lint fmt bench fuzz vm generate install clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/wayout
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/wayout ./cmd/wayout

demo: build ## a many-address host, a client and an origin in namespaces of their own (needs root)
	$(GO) run ./scripts/demo -wayout bin/wayout

test: ## every test, under the race detector; live tests need root
	$(GO) test -race -p 1 -timeout 20m ./... # one package at a time: live tests want the machine to themselves
	GOFLAGS=-tags=clsact $(GO) test -race -p 1 -run 'Divert|Fragments|Responder|SharedPrefix|Transparent|PrefixNeighbours' ./bpf ./cmd/wayout # as below Linux 6.6

soak: ## the hunts for a wrong source address, of proxies' clients and of diverted traffic, WAYOUT_SOAK operations each (needs root)
	WAYOUT_TEST_LIVE=1 WAYOUT_SOAK=$(or $(WAYOUT_SOAK),100000) $(GO) test -run '^TestSoak' -count=1 -v -timeout 60m ./cmd/wayout

lint: ## golangci-lint, go vet and clang-format
	$(GO) vet ./...
	golangci-lint run ./...
	@if ls bpf/*.c >/dev/null 2>&1; then clang-format-14 --dry-run --Werror bpf/*.c bpf/*.h; fi

fmt: ## put the code into its canonical form
	golangci-lint fmt ./...
	clang-format-14 -i bpf/*.c bpf/*.h

bench: ## microbenchmarks, and the tests that hot paths make no garbage; BENCH=regexp narrows the former
	$(GO) test -run 'Alloc' -count=1 ./selection ./router/...
	$(GO) test -run '^$$' -bench '$(or $(BENCH),.)' -benchmem ./...
	@echo 'Beside other proxies, from outside (needs root): make build && $(GO) run ./scripts/bench'

fuzz: ## every fuzz target for FUZZTIME each
	FUZZTIME=$(FUZZTIME) ./scripts/fuzz

vm: ## VMTESTS (package=regexp ...) on the kernel of Debian's package VMKERNEL, in a virtual machine (needs qemu-system-x86; installs nothing)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
		package=$$(apt-cache depends --no-recommends --no-suggests $(VMKERNEL) | awk '/Depends: linux-image-/ { print $$2; exit }') && \
		(cd "$$dir" && apt-get download -qq -o APT::Sandbox::User=root "$${package:-$(VMKERNEL)}" && dpkg -x *.deb .) && \
		$(GO) run ./scripts/vm -root "$$dir" -timeout 20m $(foreach t,$(VMTESTS),-test '$(t)')

generate: ## rebuild what is generated and committed (needs clang-14 and libbpf's headers)
	BPF2GO_CC=$(CLANG) BPF2GO_STRIP=$(STRIP) $(GO) generate ./...
	UPDATE_GOLDEN=1 $(GO) test -count=1 -run Reference ./router/config
	{ echo '# Configuration'; echo; echo 'Made by `make generate` from the table that the program itself reads: `wayout check --reference` prints it.'; echo; \
		$(GO) run ./cmd/wayout check --reference; } >docs/configuration.md

install: build ## install the binary and the unit file below PREFIX
	install -D -m 0755 bin/wayout $(DESTDIR)$(PREFIX)/bin/wayout
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's,/usr/local/bin,$(PREFIX)/bin,' scripts/wayout.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/wayout.service
	chmod 0644 $(DESTDIR)$(PREFIX)/lib/systemd/system/wayout.service

clean: ## remove what was built
	rm -rf bin

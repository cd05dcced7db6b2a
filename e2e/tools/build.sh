#!/bin/sh
# Builds the real servers and independent clients that the end-to-end suites run, from the Go module proxy and PyPI, into
# target/tools. Each lives in a Go module of its own beside this script, because their dependency graphs do not agree;
# go.sum, and the hashes in requirements.txt, are what makes the build trustworthy. A tool is built again only when what
# it is made of changed, so calling this script twice is cheap. It works offline once the modules are in Go's cache.
#
# Usage: e2e/tools/build.sh [TOOL...]        (no argument: all of them)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=${CARGO_TARGET_DIR:-$here/../../target}/tools

# tool | module folder | package | what to expect on two cores with empty caches
tools='
consul|consul|github.com/hashicorp/consul|about 3 minutes
grpc-interop-client|grpc-interop|google.golang.org/grpc/interop/client|about 20 seconds
grpc-interop-server|grpc-interop|google.golang.org/grpc/interop/server|a few seconds
h2spec|h2spec|github.com/summerwind/h2spec/cmd/h2spec|about 20 seconds
http-peer|http-peer|.|about 20 seconds
'

if ! command -v go >/dev/null 2>&1; then
	echo "e2e/tools: 'go' is not on the PATH. The end-to-end suites run real Consul and gRPC peers, which are built" >&2
	echo "from source: install Go 1.26 or newer (https://go.dev/dl/, or any 1.21+ that may fetch it) and try again." >&2
	exit 69
fi

if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
	echo "e2e/tools: Python 3 with its venv and pip is missing. The end-to-end suites run Python's gRPC as an independent" >&2
	echo "peer: install them (on Debian: apt-get install python3-venv) and try again." >&2
	exit 69
fi

mkdir -p "$out"
# GOOS and friends may be set for other purposes; these programs run here and now.
unset GOOS GOARCH GOFLAGS
GOTOOLCHAIN=${GOTOOLCHAIN:-auto}
CGO_ENABLED=0
export GOTOOLCHAIN CGO_ENABLED

# wanted TOOL [NAME...]: is TOOL among the names? No names: yes.
wanted() {
	tool=$1
	shift
	[ $# -gt 0 ] || return 0
	for name in "$@"; do [ "$name" = "$tool" ] && return 0; done
	return 1
}

# The heredoc (not a pipe) keeps `set -e` in this shell.
while IFS='|' read -r tool module package estimate; do
	[ -n "$tool" ] || continue
	wanted "$tool" "$@" || continue
	# Our own program has sources and no dependencies, the others the reverse.
	made_of=$(for file in go.mod go.sum main.go; do [ ! -e "$here/$module/$file" ] || cat "$here/$module/$file"; done)
	key="$package $(printf '%s\n' "$made_of" | sha256sum | cut -c1-64)"
	if [ -x "$out/$tool" ] && [ "$(cat "$out/$tool.key" 2>/dev/null)" = "$key" ]; then
		echo "e2e/tools: $tool is current"
		continue
	fi
	echo "e2e/tools: building $tool ($package; $estimate when nothing is cached)"
	rm -f "$out/$tool.key"
	# Niced: a developer builds Rust at the same time.
	(cd "$here/$module" && nice go build -mod=readonly -trimpath -ldflags '-s -w' -o "$out/$tool" "$package")
	printf '%s\n' "$key" >"$out/$tool.key"
done <<EOF
$tools
EOF

# Gateway API's routes for meshes, as its conformance tests apply them: of the module, only the files.
if wanted gateway-api "$@"; then
	module=sigs.k8s.io/gateway-api/conformance@v1.6.3
	sum=h1:UxhSb1GrDsyl+PdKe3g8a/BFWgP6hzy2PPFmZRgqeMQ=
	if [ "$(cat "$out/gateway-api.key" 2>/dev/null)" = "$module $sum" ]; then
		echo "e2e/tools: gateway-api is current"
	else
		echo "e2e/tools: fetching $module (a few seconds)"
		rm -rf "$out/gateway-api.key" "$out/gateway-api"
		# Outside of every module: only the one that is named.
		fetched=$(cd / && go mod download -json "$module")
		field() { printf '%s\n' "$fetched" | sed -n "s/^.*\"$1\": \"\([^\"]*\)\".*/\1/p"; }
		if [ "$(field Sum)" != "$sum" ]; then
			echo "e2e/tools: $module has another checksum than it had: $(field Sum)" >&2
			exit 1
		fi
		mkdir -p "$out/gateway-api"
		cp "$(field Dir)"/tests/mesh/*.yaml "$out/gateway-api"
		chmod -R u+w "$out/gateway-api"
		printf '%s\n' "$module $sum" >"$out/gateway-api.key"
	fi
fi

# grpcio in a virtual environment of its own, and a command that runs our peer in it.
if wanted grpc-python "$@"; then
	made_of=$(cat "$here/grpc-python/requirements.txt" "$here/grpc-python/grpc_peer.py")
	key="$(python3 --version) $(printf '%s\n' "$made_of" | sha256sum | cut -c1-64)"
	if [ -x "$out/grpc-python" ] && [ "$(cat "$out/grpc-python.key" 2>/dev/null)" = "$key" ]; then
		echo "e2e/tools: grpc-python is current"
	else
		echo "e2e/tools: installing grpcio from PyPI (about 15 seconds when nothing is cached)"
		rm -rf "$out/grpc-python.key" "$out/python"
		nice python3 -m venv "$out/python"
		nice "$out/python/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
			--only-binary :all: --require-hashes -r "$here/grpc-python/requirements.txt"
		cp "$here/grpc-python/grpc_peer.py" "$out/python/grpc_peer.py"
		cat >"$out/grpc-python" <<'EOF'
#!/bin/sh
home=$(dirname "$0")/python
exec "$home/bin/python" "$home/grpc_peer.py" "$@"
EOF
		chmod +x "$out/grpc-python"
		printf '%s\n' "$key" >"$out/grpc-python.key"
	fi
fi

#!/bin/sh
# Builds the real servers and independent clients that the end-to-end suites run, from the Go module proxy and PyPI, into
# target/tools. Each lives in a Go module of its own beside this script, because their dependency graphs do not agree;
# go.sum, and the hashes in requirements.txt, are what makes the build trustworthy. A tool is built again only when what
# it is made of changed, so calling this script twice is cheap. It works offline once the modules are in Go's cache.
#
# Usage: e2e/tools/build.sh [TOOL|GROUP...]        (no argument: the groups `test` and `api`)
# Groups are what needs them: `test` and `api` make test, `api` and `node` make kubernetes.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=${CARGO_TARGET_DIR:-$here/../../target}/tools

# group | tool | module folder | package | what to expect on two cores with empty caches
tools='
test|consul|consul|github.com/hashicorp/consul|about 3 minutes
test|grpc-interop-client|grpc-interop|google.golang.org/grpc/interop/client|about 20 seconds
test|grpc-interop-server|grpc-interop|google.golang.org/grpc/interop/server|a few seconds
test|h2spec|h2spec|github.com/summerwind/h2spec/cmd/h2spec|about 20 seconds
test|http-peer|http-peer|.|about 20 seconds
api|etcd|kubernetes|go.etcd.io/etcd/server/v3|about 1 minute
api|kube-apiserver|kubernetes|k8s.io/kubernetes/cmd/kube-apiserver|about 3 minutes
api|kube-controller-manager|kubernetes|k8s.io/kubernetes/cmd/kube-controller-manager|about 1 minute
api|kubectl|kubernetes|k8s.io/kubernetes/cmd/kubectl|about 20 seconds
api|helm|helm|helm.sh/helm/v3/cmd/helm|about 1 minute
node|kube-scheduler|kubernetes|k8s.io/kubernetes/cmd/kube-scheduler|a few seconds
node|kubelet|kubernetes|k8s.io/kubernetes/cmd/kubelet|about 20 seconds
node|kube-proxy|kubernetes|k8s.io/kubernetes/cmd/kube-proxy|about 10 seconds
node|coredns|coredns|github.com/coredns/coredns|about 1 minute
node|pause|pause|.|a second
conformance|gateway-conformance|conformance|sigs.k8s.io/gateway-api/conformance|about 1 minute
conformance|echo-server|echo|istio.io/istio/pkg/test/echo/cmd/server|about 30 seconds
conformance|echo-client|echo|istio.io/istio/pkg/test/echo/cmd/client|a few seconds
'

if ! command -v go >/dev/null 2>&1; then
	echo "e2e/tools: 'go' is not on the PATH. The end-to-end suites run real Consul and gRPC peers, which are built" >&2
	echo "from source: install Go 1.26 or newer (https://go.dev/dl/, or any 1.21+ that may fetch it) and try again." >&2
	exit 69
fi

mkdir -p "$out"
# GOOS and friends may be set for other purposes; these programs run here and now.
unset GOOS GOARCH GOFLAGS
GOTOOLCHAIN=${GOTOOLCHAIN:-auto}
CGO_ENABLED=0
export GOTOOLCHAIN CGO_ENABLED

[ $# -gt 0 ] || set -- test api

# wanted GROUP TOOL NAME...: is the tool, or its group, among the names?
wanted() {
	group=$1 tool=$2
	shift 2
	for name in "$@"; do
		if [ "$name" = "$group" ] || [ "$name" = "$tool" ]; then return 0; fi
	done
	return 1
}

# flags MODULE: what the linker is told. Kubernetes' commands say which version they are, and some ask themselves.
flags() {
	[ "$1" = kubernetes ] || { echo '-s -w'; return; }
	version=$(cd "$here/$1" && go list -mod=readonly -m -f '{{.Version}}' k8s.io/kubernetes)
	minor=${version#v*.}
	set -- k8s.io/component-base/version
	echo "-s -w -X $1.gitVersion=$version -X $1.gitMajor=1 -X $1.gitMinor=${minor%.*}"
}

# The heredoc (not a pipe) keeps `set -e` in this shell.
while IFS='|' read -r group tool module package estimate; do
	[ -n "$group" ] || continue
	wanted "$group" "$tool" "$@" || continue
	# Our own program has sources and no dependencies, the others the reverse.
	made_of=$(for file in go.mod go.sum main.go; do [ ! -e "$here/$module/$file" ] || cat "$here/$module/$file"; done)
	key="$package $(printf '%s\n' "$made_of" | sha256sum | cut -c1-64)"
	if [ -x "$out/$tool" ] && [ "$(cat "$out/$tool.key" 2>/dev/null)" = "$key" ]; then
		echo "e2e/tools: $tool is current"
		continue
	fi
	echo "e2e/tools: building $tool ($package; $estimate when nothing is cached)"
	rm -f "$out/$tool.key"
	# The conformance suite is a test, and becomes a program as one.
	if [ "$module" = conformance ]; then how='test -c'; else how=build; fi
	# Niced: a developer builds Rust at the same time.
	# shellcheck disable=SC2086  # two words where it is a test
	(cd "$here/$module" && nice go $how -mod=readonly -trimpath -ldflags "$(flags "$module")" -o "$out/$tool" "$package")
	printf '%s\n' "$key" >"$out/$tool.key"
done <<EOF
$tools
EOF

# files TOOL MODULE SUM PATTERN: of a module, only the files of this pattern.
files() {
	if [ "$(cat "$out/$1.key" 2>/dev/null)" = "$2 $3" ]; then
		echo "e2e/tools: $1 is current"
		return
	fi
	echo "e2e/tools: fetching $2 (a few seconds)"
	rm -rf "$out/$1.key" "${out:?}/$1"
	# Outside of every module: only the one that is named.
	fetched=$(cd / && go mod download -json "$2")
	field() { printf '%s\n' "$fetched" | sed -n "s/^.*\"$1\": \"\([^\"]*\)\".*/\1/p"; }
	if [ "$(field Sum)" != "$3" ]; then
		echo "e2e/tools: $2 has another checksum than it had: $(field Sum)" >&2
		exit 1
	fi
	mkdir -p "$out/$1"
	# shellcheck disable=SC2086  # a pattern
	cp "$(field Dir)"/$4 "$out/$1"
	chmod -R u+w "$out/$1"
	printf '%s\n' "$2 $3" >"$out/$1.key"
}

# Gateway API's routes for meshes, as its conformance tests apply them, and its kinds.
if wanted test gateway-api "$@"; then
	files gateway-api sigs.k8s.io/gateway-api/conformance@v1.6.3 h1:UxhSb1GrDsyl+PdKe3g8a/BFWgP6hzy2PPFmZRgqeMQ= 'tests/mesh/*.yaml'
fi
if wanted api gateway-api-crds "$@"; then
	files gateway-api-crds sigs.k8s.io/gateway-api@v1.6.3 h1:lKpJa5bGlraC/QeACvCpsHLdmO6y0iKfzVl6gzaFEYc= 'config/crd/standard/*.yaml'
fi

# grpcio in a virtual environment of its own, and a command that runs our peer in it.
if wanted test grpc-python "$@"; then
	if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
		echo "e2e/tools: Python 3 with its venv and pip is missing. The end-to-end suites run Python's gRPC as an independent" >&2
		echo "peer: install them (on Debian: apt-get install python3-venv) and try again." >&2
		exit 69
	fi
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

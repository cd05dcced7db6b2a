#!/bin/sh
# Builds the three images from static binaries, with Buildah: no daemon, no privilege beyond a user namespace, nothing
# outside of target/. Each is one binary and the licence. They are named as the chart's defaults say, and each is also a file
# that nodes can import: `ctr -n k8s.io images import`, `kind load image-archive`, `k3s ctr images import`.
#
# The times in an image are those of the last commit (or SOURCE_DATE_EPOCH), so the same binary makes the same image.
#
# Usage: charts/images.sh [amd64|arm64 [TAG]]        (this machine's architecture, the workspace's version)
set -eu
cd "$(dirname "$0")/.."

case $(uname -m) in
x86_64) here=amd64 ;;
aarch64) here=arm64 ;;
*) here=$(uname -m) ;;
esac
arch=${1:-$here}
case $arch in
amd64) target=x86_64-unknown-linux-gnu gcc=x86_64-linux-gnu-gcc ;;
arm64) target=aarch64-unknown-linux-gnu gcc=aarch64-linux-gnu-gcc ;;
*)
	echo "charts/images.sh: there are images for amd64 and arm64, not for '$arch'" >&2
	exit 64
	;;
esac
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
tag=${2:-$version}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
source=${IMAGE_SOURCE:-https://outrigger.dev}

if [ "$arch" != "$here" ]; then
	if ! command -v "$gcc" >/dev/null; then
		echo "charts/images.sh: $gcc is missing (the TLS library needs it): apt-get install gcc-${gcc%-gcc}" >&2
		exit 1
	fi
	rustup target add "$target"
	upper=$(echo "$target" | tr 'a-z-' 'A-Z_')
	export "CARGO_TARGET_${upper}_LINKER=$gcc" "CC_$(echo "$target" | tr - _)=$gcc"
fi
RUSTFLAGS='-C target-feature=+crt-static' ${CARGO:-cargo} build --locked --release --target "$target" \
	-p outrigger -p outrigger-controller -p outrigger-proxy

images=target/images
context=$images/context
suffix=$([ "$arch" = "$here" ] || echo "-$arch")
mkdir -p "$images"

# Isolation and storage that need neither overlay mounts nor root.
run() {
	command=$1
	shift
	buildah --root "$PWD/$images/storage" --runroot "$PWD/$images/run" --storage-driver vfs "$command" "$@"
}

image() {
	name=$1 folder=$2
	rm -rf "$context"
	mkdir "$context"
	cp LICENSE "target/$target/release/$name" "$context"
	chmod 755 "$context/$name"
	run build --quiet --isolation chroot --arch "$arch" --timestamp "$epoch" --file "$folder/Dockerfile" \
		--build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "SOURCE=$source" \
		--tag "localhost/$name:$tag" "$context" >"$images/$name$suffix.id"
	rm -f "$images/$name$suffix.tar"
	run push --quiet "localhost/$name:$tag" "docker-archive:$images/$name$suffix.tar:localhost/$name:$tag"
	printf '%-42s %s  %5.1f MiB  %s\n' "localhost/$name:$tag" "$arch" \
		"$(du -b "$images/$name$suffix.tar" | awk '{print $1 / 1048576}')" "$images/$name$suffix.tar"
}

image outrigger control-plane/cli
image outrigger-controller control-plane/controller
image outrigger-proxy proxy/sidecar
# What was not asked for again is of no use; the files stay.
rm -rf "$context"
run rmi --all --force >/dev/null 2>&1 || true

#!/bin/sh
# Fuzzes each target of proxy/http/fuzz for some seconds, from the corpus that is kept there. What is found new stays in
# target/fuzz/corpus; a crash ends with an error, and its input lies in target/fuzz/artifacts.
#
# cargo-fuzz builds the targets, pinned, into target/tools. It wants a nightly compiler for flags that the pinned stable one takes
# too when it is told that it may (RUSTC_BOOTSTRAP). Without a sanitizer: there is no unsafe code here, so what it could find are
# faults of the standard library; panics, overflows and hangs are found without, two to three times as fast.
#
# Usage: e2e/tools/fuzz.sh SECONDS [TARGET...]        (no target: all of them)
set -eu

version=0.13.2
seconds=$1
shift

here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
out=${CARGO_TARGET_DIR:-$root/target}
tools=$out/tools
fuzz=$root/proxy/http/fuzz

if [ "$("$tools/bin/cargo-fuzz" --version 2>/dev/null)" != "cargo-fuzz $version" ]; then
	echo "e2e/tools: building cargo-fuzz (about a minute)"
	cargo install --locked --quiet --root "$tools" --version "$version" cargo-fuzz
fi

cd "$root/proxy/http"
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$out/fuzz"
[ $# -gt 0 ] || set -- $(ls "$fuzz/fuzz_targets" | sed -n 's/\.rs$//p')
for target in "$@"; do
	echo "== fuzz: $target, $seconds s"
	mkdir -p "$out/fuzz/corpus/$target" "$out/fuzz/artifacts/$target"
	dictionary=
	case $target in h1_*) dictionary=-dict=$fuzz/h1.dict ;; esac
	"$tools/bin/cargo-fuzz" fuzz run --sanitizer none "$target" "$out/fuzz/corpus/$target" "$fuzz/corpus/$target" -- \
		-artifact_prefix="$out/fuzz/artifacts/$target/" $dictionary -timeout=20 -rss_limit_mb=2048 \
		-max_total_time="$seconds" -print_final_stats=1 >"$out/fuzz/$target.log" 2>&1 || {
		tail -40 "$out/fuzz/$target.log" >&2
		exit 1
	}
	grep 'stat::number_of_executed_units' "$out/fuzz/$target.log"
done

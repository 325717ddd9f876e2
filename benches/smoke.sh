#!/usr/bin/env bash
# Runs every benchmark in its smoke size, answers checked, figures meaningless: seconds each, but for
# the load harness, which takes half a minute.
# Exit code 1 if one fails. Compiles FAISS the first time.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --quiet -p thenar-bench --bins
for bench in peers kernels open harness; do
    printf '\n-- %s --smoke\n' "$bench"
    cargo run --quiet -p thenar-bench --bin "$bench" -- --smoke
done
for call in small timings matrices capacity; do
    printf '\n-- gpu_check %s --smoke\n' "$call"
    cargo run --quiet -p thenar-bench --bin gpu_check -- "$call" --smoke
done

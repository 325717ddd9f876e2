#!/usr/bin/env bash
# Checks and tests everything; the last line counts. Called by `make test`.
set -uo pipefail
cd "$(dirname "$0")/.."
export THENAR_REQUIRE_GPU=1 # here lavapipe is installed, so a skipped GPU test is a failure
export CARGO_TERM_COLOR=never

passed=0 failed=0 skipped=0
stage() { # NAME COMMAND...: one stage is one test
    local name=$1 started=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    if "$@"; then
        passed=$((passed + 1))
        printf -- '-- %s: passed in %d s\n' "$name" $((SECONDS - started))
    else
        failed=$((failed + 1))
        printf -- '-- %s: FAILED after %d s\n' "$name" $((SECONDS - started))
    fi
}
count() { # a number before WORD in a summary line, 0 where there is none
    sed -nE "s/.* ([0-9]+) $2.*/\1/p" <<<" $1" | head -n 1 | grep . || echo 0
}
counted() { # NAME SUMMARY_PATTERN COMMAND...: a runner that counts its own tests
    local name=$1 pattern=$2 started=$SECONDS log code
    shift 2
    log=$(mktemp)
    printf '\n== %s\n' "$name"
    "$@" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    local summary
    summary=$(grep -E "$pattern" "$log" | tail -n 1)
    rm -f "$log"
    local ok bad skip
    ok=$(count "$summary" passed) skip=$(count "$summary" skipped)
    bad=$(($(count "$summary" failed) + $(count "$summary" 'errors?') + $(count "$summary" 'timed out')))
    # A runner that fails without a failed test (it did not build, say) is a failure all the same.
    ((code != 0 && bad == 0)) && bad=1
    passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))
    printf -- '-- %s: %d passed, %d failed, %d skipped in %d s\n' "$name" "$ok" "$bad" "$skip" $((SECONDS - started))
}
docs() { RUSTDOCFLAGS="-D warnings" cargo doc --workspace --features thenar/faiss --no-deps --document-private-items --quiet; }

stage "format" cargo fmt --all --check
# With FAISS, which the benchmarks compile anyway, and as it ships, without: the integration tests run against
# the binary that people build, and the Python client after them uses it. Each build overwrites target/debug/thenar,
# so the order matters.
stage "lints" cargo clippy --workspace --features thenar/faiss --all-targets --quiet -- -D warnings
stage "lints, as it ships" cargo clippy -p thenar --all-targets --quiet -- -D warnings
stage "documentation" docs
counted "tests" 'tests run:' cargo nextest run --workspace --features thenar/faiss --no-fail-fast \
    -E 'not (package(thenar) and binary(it)) + test(/^audit::with_faiss/)'
stage "documentation examples" cargo test --workspace --features thenar/faiss --doc --quiet
counted "integration tests, as it ships" 'tests run:' cargo nextest run -p thenar --test it --no-fail-fast
counted "Python client" '^=+ .* in [0-9.]+s' .venv/bin/python -m pytest tests/python
stage "benchmarks, smoke size" benches/smoke.sh

printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
((failed == 0))

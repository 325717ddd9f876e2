#!/usr/bin/env bash
# Installs what Thenar's tests need and this machine lacks. To build and run a server, Rust and a C
# compiler are enough.
#
#   deploy/setup.sh           install what is missing (Debian, Ubuntu)
#   deploy/setup.sh --check   only say what is missing; exit 1 if anything is
#   deploy/setup.sh --check-bench   the same for what compiling FAISS for the benchmarks needs
set -euo pipefail
cd "$(dirname "$0")/.."

check_only=false bench_only=false
case "${1:-}" in
    --check) check_only=true ;;
    --check-bench) check_only=true bench_only=true ;;
    "") ;;
    *) echo "usage: deploy/setup.sh [--check | --check-bench]" >&2; exit 2 ;;
esac

# What it is for, Debian's package, and a command that succeeds if it is there.
missing_packages=()
missing_words=()
need() { # WORDS PACKAGE TEST...
    local words=$1 package=$2
    shift 2
    if ! "$@" >/dev/null 2>&1; then
        missing_packages+=("$package")
        missing_words+=("$words")
    fi
}
have_file() { compgen -G "$1"; }
compiles_openblas() { echo 'int main(void){return 0;}' | cc -x c - -lopenblas -o /dev/null; }
have_venv() { python3 -c 'import ensurepip, venv'; }

need "a C compiler (SQLite)" gcc command -v cc
need "a C++ compiler (FAISS, in benchmarks and audits)" g++ command -v c++
need "cmake (FAISS, in benchmarks and audits)" cmake command -v cmake
need "make" make command -v make
need "OpenBLAS (FAISS, in benchmarks and audits)" libopenblas-dev compiles_openblas
if $bench_only; then
    if ((${#missing_packages[@]})); then
        printf 'missing: %s\n' "${missing_words[@]}" >&2
        echo "On Debian and Ubuntu: apt-get install ${missing_packages[*]}" >&2
        exit 1
    fi
    exit 0
fi
need "the Vulkan loader (GPU engine)" libvulkan1 have_file '/usr/lib*/*/libvulkan.so.1'
need "a software Vulkan driver, lavapipe (GPU engine's tests)" mesa-vulkan-drivers have_file '/usr/share/vulkan/icd.d/lvp_icd*.json'
need "Python 3 (client test)" python3 command -v python3
need "Python's venv (client test)" python3-venv have_venv

if ! command -v cargo >/dev/null; then
    echo "cargo is missing: install Rust with rustup, https://rustup.rs" >&2
    exit 1
fi

if ((${#missing_packages[@]})); then
    printf 'missing: %s\n' "${missing_words[@]}"
    $check_only && exit 1
    if ! command -v apt-get >/dev/null; then
        echo "This script installs on Debian and Ubuntu. Elsewhere, install what these packages contain:" >&2
        printf '  %s\n' "${missing_packages[@]}" >&2
        exit 1
    fi
    sudo=()
    ((EUID)) && sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing_packages[@]}" >/dev/null
fi

if ! cargo nextest --version >/dev/null 2>&1; then
    echo "missing: cargo-nextest (test runner)"
    $check_only && exit 1
    cargo install --locked cargo-nextest
fi

if ! .venv/bin/python -c 'import grpc, grpc_tools, numpy, pytest' >/dev/null 2>&1; then
    echo "missing: Python packages in .venv (client test)"
    $check_only && exit 1
    rm -rf .venv
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r tests/python/requirements.txt
fi
echo "everything the tests need is here"

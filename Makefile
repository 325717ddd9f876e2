# The two commands of the README, and what they are made of.

.PHONY: demo test setup bench

# Needs Rust and a C compiler only.
demo:
	cargo run --release -- demo

# Installs what the tests need, then checks and tests everything.
test: setup
	tests/run.sh

setup:
	deploy/setup.sh

# FAISS and Thenar on one gallery, in one run. Compiles FAISS the first time.
bench:
	deploy/setup.sh --check-bench
	cargo run --release -p thenar-bench --bin peers

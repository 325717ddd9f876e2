#!/usr/bin/env bash
# Runs gpu_check's calls on a machine with a graphics card. That machine needs no Rust: build here with
#
#     cargo build --release -p thenar-bench --no-default-features --bin gpu_check
#
# and take this script and target/release/gpu_check there. Usage: benches/gpu.sh OUT [CALL ...]
# where OUT is a folder for the results and CALL is small, timings, matrices or capacity (without any:
# all four, in this order). Each call takes less than ten minutes, with the making of its gallery.
# GPU_CHECK names the program, TORCH_PYTHON a Python with PyTorch, GPU_CHECK_FLAGS goes to every call
# (say --no-matrices). Exit code 1 if a call failed; the others run all the same.
set -euo pipefail
cd "$(dirname "$0")/.."
program=${GPU_CHECK:-target/release/gpu_check}
python=${TORCH_PYTHON:-python3}
out=${1:?"usage: benches/gpu.sh OUT [CALL ...]"}
shift
[ $# -gt 0 ] || set -- small timings matrices capacity
[ -x "$program" ] || { echo "gpu.sh: there is no program $program; see the head of this script" >&2; exit 1; }
ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' ||
    echo "gpu.sh: no Vulkan loader (libvulkan.so.1) is installed: no adapter will be found" >&2
mkdir -p "$out"
# Without a manifest where the loader looks, the driver's own folder is tried.
if [ -z "${VK_DRIVER_FILES:-}" ] && ! ls /usr/share/vulkan/icd.d/nvidia*.json /etc/vulkan/icd.d/nvidia*.json >/dev/null 2>&1; then
    for manifest in /usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json; do
        [ -r "$manifest" ] && export VK_DRIVER_FILES=$manifest
    done
fi
failed=0
for call in "$@"; do
    printf '\n== %s\n' "$call"
    flags=()
    if [ "$call" = timings ] && "$python" -c 'import torch' 2>/dev/null; then
        flags+=(--torch "$python")
    fi
    # shellcheck disable=SC2086
    timeout 590 "$program" "$call" --json "$out/gpu-$call.json" "${flags[@]}" ${GPU_CHECK_FLAGS:-} 2>&1 |
        tee "$out/gpu-$call.txt" || failed=1
done
exit "$failed"

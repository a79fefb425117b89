#!/usr/bin/env bash
# Builds and smoke-tests the package beside several releases of Python and torch, and prints the table of
# docs/compatibility.md. One environment at a time, in a temporary folder (TMPDIR; about 7 GB each with torch's CUDA).
#
#     tools/matrix.sh                                 all pairs below
#     tools/matrix.sh python3.12:2.14.1 ...           these: an interpreter and a release of torch
#
# Each environment gets torch first; `pip install .` must then build against that one. GRADAUG_BUILD_CUDA=0 unless set.
set -uo pipefail
sources=$(cd "$(dirname "$0")/.." && pwd)
export GRADAUG_BUILD_CUDA=${GRADAUG_BUILD_CUDA:-0}
pairs=("$@")
[ ${#pairs[@]} -gt 0 ] || pairs=(
    python3.11:2.11.0 python3.11:2.12.1 python3.11:2.13.0 python3.11:2.14.1 python3.11:2.15.0
    python3.12:2.14.1 python3.12:2.15.0 python3.13:2.14.1 python3.13:2.15.0
)

check() { # interpreter, torch; in an empty folder
    "$1" -m venv venv && source venv/bin/activate &&
        pip install "torch==$2" 'torchvision>=0.26,<0.30' &&
        pip install "$sources" &&
        pip check &&
        python -c "import sys, torch; assert torch.__version__.split('+')[0] == sys.argv[1], torch.__version__" "$2" &&
        python "$sources/tools/smoke.py" cpp
}

failed=0
table='| Python | torch | torchvision | NumPy | built | smoke test | minutes |\n|---|---|---|---|---|---|---|\n'
for pair in "${pairs[@]}"; do
    work=$(mktemp -d)
    start=$SECONDS
    cd "$work"
    if (check "${pair%%:*}" "${pair##*:}") >"$work/log" 2>&1; then
        result=passes
    else
        result=fails
        failed=1
        tail -n 30 "$work/log"
    fi
    row=$(venv/bin/python - 2>/dev/null <<'PYTHON'
import importlib.metadata, json, platform, pathlib, sys
versions = [platform.python_version(), *map(importlib.metadata.version, ("torch", "torchvision", "numpy"))]
site = pathlib.Path(importlib.metadata.distribution("numpy").locate_file(""))
build = json.loads((site / "gradaug_kernels" / "_build.json").read_text())
print(" | ".join([*versions, " and ".join(each for each in ("cpu", "cuda") if build[each])]))
PYTHON
) || row="${pair%%:*} | ${pair##*:} | | | "
    table+="| $row | $result | $(((SECONDS - start + 59) / 60)) |\n"
    printf '%s: %s\n' "$pair" "$result"
    cd / && rm -rf "$work"
done
printf "\n$(uname -sm), $(${CXX:-c++} --version | head -n 1), $(date +%F)\n\n$table"
exit $failed

#!/usr/bin/env bash
# Ray for tests/sweeps/test_ray.py, in the Python that runs the tests; the test starts and stops it.
#   bash tests/install_ray.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python}
"$python" -m pip install --quiet --disable-pip-version-check -e '.[ray]'
"$python" -c "import ray; print('ray', ray.__version__)"

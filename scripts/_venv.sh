# Sourced by the other scripts: makes .venv in the repository root if it is not there, and installs
# the package with the extras given in $1 and the versions that CI tests. PYTHON chooses the
# interpreter, VENV the folder.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "edgestill needs Python 3.11 or newer; set PYTHON to one" >&2
    exit 2
  }
  "$PYTHON" -m venv "$VENV"
fi
stamp="$VENV/.installed${1:-}"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${1:-}"
  touch "$stamp"
fi

# Sourced by quickstart.sh and test.sh: makes a virtual environment with the project and its packages, once, and activates it.
#
#   DS_ZOADAMU_VENV   where the environment is (default: .venv in the repository)
#   PYTHON            the interpreter to make it with (default: the first of python3, python3.13 ... python3.10 that will do)

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DS_ZOADAMU_VENV:-$repository/.venv}

stop() {
    echo "setup: $*" >&2
    exit 1
}

will_do() {
    command -v "$1" > /dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if will_do "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

has_gpu() {
    { command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; } || [ -e /dev/kfd ]
}

# DeepSpeed builds its operator for NVMe offload against libaio. Nothing else needs it, so its absence is no failure.
install_libaio() {
    local as_root=""
    if [ -e /usr/include/libaio.h ] || ! command -v apt-get > /dev/null; then
        return 0
    fi
    if [ "$(id -u)" -ne 0 ]; then
        as_root="sudo -n"
    fi
    quiet_apt() { $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" > /dev/null 2>&1; }
    quiet_apt install -y libaio-dev || { quiet_apt update && quiet_apt install -y libaio-dev; } ||
        echo "setup: libaio-dev could not be installed; offload to NVMe is left out, its tests are skipped" >&2
}

install() {
    local python
    python=$(find_python) || stop "Python 3.10 or newer is needed, found: $("${PYTHON:-python3}" --version 2>&1 | head -n 1 || true)." \
        "Install one, or name one with PYTHON=/path/to/python3"
    echo "setup: installing into $venv (some minutes, once)"
    install_libaio
    "$python" -m venv "$venv" || stop "cannot make a virtual environment with $python; on Debian and Ubuntu: apt install python3-venv"
    # Without a GPU the small build must come first: the project's own requirement would fetch any.
    if ! has_gpu; then
        "$venv/bin/python" -m pip install --quiet torch==2.13.0 || stop "cannot install PyTorch, see above"
    fi
    "$venv/bin/python" -m pip install --quiet -e "$repository[test]" || stop "cannot install the packages of setup.cfg, see above"
}

# What is installed follows from setup.cfg, so its content tells whether the environment is current.
stamp=$venv/.ds_zoadamu_installed
if ! { [ -x "$venv/bin/python" ] && cmp --silent "$repository/setup.cfg" "$stamp"; }; then
    install
    cp "$repository/setup.cfg" "$stamp"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"

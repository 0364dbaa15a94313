#!/bin/bash
# What the image holds, step by step. Dockerfile and apptainer.def run these same steps, so there is one definition
# of the environment. A step whose input has not changed since it last ran in this file system does nothing: an
# apptainer build that starts from the Docker image takes only what is new.
#
#   build.sh system | packages | project
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=/opt/moco
export UV_NO_CACHE=1 # else a folder of the builder's stays in the home, and others cannot write theirs
TORCH=${TORCH:-2.6.0}             # the newest whose wheels run on glibc 2.27 (Ubuntu 18.04); 2.7 needs 2.28
TORCHVISION=${TORCHVISION:-0.21.0}
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cu118}  # empty: the default package index
case $TORCH_INDEX in
  *://*@*) echo "error: TORCH_INDEX holds a name or password, which would stay in the image; use a .netrc or a mirror" >&2; exit 1 ;;
esac

fresh() { # fresh STEP INPUT...: whether the step last ran with other input; remembers this one in $stamp
  stamp="$prefix/.$1-$(cat "${@:2}" container/build.sh | cat - <(echo "$TORCH $TORCHVISION $TORCH_INDEX") | sha256sum | cut -c1-16)"
  [ ! -e "$stamp" ] && rm -f "$prefix/.$1-"*
}

system() {
  fresh system /etc/os-release || return 0
  # NVIDIA's lists in the old base images are signed with a key that was withdrawn in 2022: apt refuses them.
  rm -f /etc/apt/sources.list.d/cuda*.list /etc/apt/sources.list.d/nvidia-ml*.list
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends ca-certificates curl git squashfs-tools squashfuse >/dev/null
  apt-get clean
  rm -rf /var/lib/apt/lists/*
  # The checkout is mounted from outside and belongs to somebody else: git must read it all the same.
  git config --system --add safe.directory '*'
  mkdir -p "$prefix"
  # Any user may run the image, also one without an account in it.
  id moco >/dev/null 2>&1 || useradd --create-home moco
  mkdir -p /home/moco && chmod 1777 /home/moco
  # Mount points for the dataset and the checkout: a SIF cannot grow them later.
  mkdir -p /dataset /project
  touch "$stamp"
}

python311() { # a Python 3.11 in $prefix: the base's where it has one, else fetched
  if python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    python3 -m venv "$prefix"
    "$prefix/bin/python" -m pip install --quiet --no-cache-dir --require-hashes -r requirements/uv.txt
    return
  fi
  mkdir -p "$prefix/bin"
  local version; version=$(sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements/uv.txt)
  curl --proto '=https' -sSfL "${UV_URL:-https://github.com/astral-sh/uv/releases/download/$version/uv-$(uname -m)-unknown-linux-gnu.tar.gz}" |
    tar -xz -C "$prefix/bin" --strip-components=1
  UV_PYTHON_INSTALL_DIR=/opt/python "$prefix/bin/uv" python install --quiet --no-bin 3.11
  UV_PYTHON_INSTALL_DIR=/opt/python "$prefix/bin/uv" venv --quiet --allow-existing --python 3.11 "$prefix"
}

packages() {
  fresh packages requirements/image.txt requirements/uv.txt || return 0
  [ -x "$prefix/bin/python" ] || python311
  # With bytecode: nobody can write it later, and without it every command compiles torch anew.
  local uv=("$prefix/bin/uv" pip install --quiet --compile-bytecode --python "$prefix/bin/python")
  "${uv[@]}" --require-hashes -r requirements/image.txt
  # torch by itself from its own index, then the CUDA libraries that this very build asks for, from there too.
  local index=(${TORCH_INDEX:+--index-url "$TORCH_INDEX"})
  # Anew: the same version built for another CUDA may be there, of an image that this one starts from.
  "${uv[@]}" "${index[@]}" --no-deps --reinstall-package torch --reinstall-package torchvision \
    "torch==$TORCH" "torchvision==$TORCHVISION"
  "$prefix/bin/python" -c 'from importlib.metadata import requires
print("\n".join(r for r in requires("torch") if r.startswith(("nvidia-", "triton", "pytorch-triton")) and "extra ==" not in r))' |
    "${uv[@]}" "${index[@]}" --no-deps -r -
  "$prefix/bin/python" -m compileall -q -x 'site-packages|/tests?/' "$("$prefix/bin/python" -c 'import os; print(os.path.dirname(os.__file__))')"
  "$prefix/bin/uv" pip check --quiet --python "$prefix/bin/python"
  touch "$stamp"
}

project() {
  # A recipe that copies whole folders may bring anything.
  [ "$PWD" != /opt/moco-build ] || find src -type f ! -name '*.py' ! -name '*.html' -delete
  "$prefix/bin/uv" pip install --quiet --compile-bytecode --python "$prefix/bin/python" --no-deps --no-build-isolation --reinstall-package moco-pipeline .
  # In a checkout its own code runs, which is what DVC hashes; elsewhere the image's.
  cat >"$prefix/bin/moco" <<'SCRIPT'
#!/bin/sh
if [ -f src/moco/errors.py ]; then export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"; fi
exec /opt/moco/bin/python -P -m moco.cli "$@"
SCRIPT
  chmod 755 "$prefix/bin/moco"
}

for step in "$@"; do "$step"; done

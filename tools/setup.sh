#!/usr/bin/env bash
# Installs what a build needs and a bare Debian 12 lacks: Debian packages (when root), then .venv from requirements.txt.
# usage: tools/setup.sh PYTHON VENV
set -euo pipefail
python=$1
venv=$2
packages=(g++ cmake ninja-build ccache git make python3 python3-venv libyaml-dev libfmt-dev nlohmann-json3-dev libcli11-dev libxxhash-dev libgtest-dev libgloo-dev liburing-dev)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
  if [[ $(id -u) != 0 ]]; then
    echo "missing Debian packages; as root: apt-get install ${missing[*]}" >&2
    exit 2
  fi
  echo "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
echo "installing Python packages into $venv (a few minutes the first time)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$PWD/python" > "$site/ulysses_plus.pth"
touch "$venv/.ready"

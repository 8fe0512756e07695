#!/bin/sh
# Installs the real peers that tests talk to, from Debian's or Ubuntu's packages, and OHIF from npm, where this may be
# done; otherwise says which tests will be left out. Arguments: packages to install instead of the peers.
set -u

# The viewer that tests/viewer looks through: built files, about 200 MB, into the user's cache. The version is that of
# tests/viewer/ohif.py.
ohif() {
  version=3.13.2
  folder="${XDG_CACHE_HOME:-$HOME/.cache}/lungnode/ohif-$version"
  [ -e "$folder/dist/index.html" ] && return
  command -v npm >/dev/null 2>&1 || { echo "npm is missing, so OHIF cannot be fetched; tests/viewer is left out"; return; }
  echo "fetching OHIF $version ..."
  mkdir -p "$folder"
  if (cd "$folder" && npm pack "@ohif/app@$version" --silent >/dev/null 2>&1 &&
      tar xzf "ohif-app-$version.tgz" --strip-components=1); then
    rm -f "$folder/ohif-app-$version.tgz"
  else
    rm -rf "$folder"
    echo "OHIF could not be fetched from npm; tests/viewer is left out"
  fi
}

if [ $# -gt 0 ]; then
  missing="$*"
else
  missing=""
  need() { PATH="$PATH:/usr/sbin" command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
  need Orthanc orthanc
  [ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] || missing="$missing orthanc-dicomweb"
  need storescu dcmtk
  need dciodvfy dicom3tools
  need redis-server redis-server
  need chromium chromium
  need npm npm
fi
if [ -z "$missing" ]; then
  [ $# -eq 0 ] && ohif
  exit 0
fi

if [ "$(id -u)" = 0 ]; then root=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then root="sudo"
else root="no"; fi

if [ "$root" = no ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "not installed, and this user may not install:$missing"
  echo "tests marked 'peer' that need them are left out; to run them: sudo apt-get install$missing"
  exit 0
fi

echo "installing$missing ..."
log=$(mktemp)
# Debian starts services when it installs them; the tests start their own, and ports and memory are yours. Unless the
# machine has a policy of its own, one that starts nothing stands for the length of the installation (policy-rc.d(8)).
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' | $root tee $policy >/dev/null && $root chmod 755 $policy
  trap '$root rm -f $policy' EXIT
fi
if $root apt-get update -qq >"$log" 2>&1 &&
   $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >>"$log" 2>&1; then
  rm -f "$log"
  [ $# -eq 0 ] && ohif
else
  tail -n 5 "$log"
  echo "could not be installed:$missing; tests that need them are left out (log: $log)"
fi
exit 0

#!/bin/sh
# Installs the real peers that tests talk to, from Debian's or Ubuntu's packages, where this may be done; otherwise says
# which tests will be left out. Arguments: packages to install instead of the peers.
set -u

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
fi
[ -z "$missing" ] && exit 0

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
else
  tail -n 5 "$log"
  echo "could not be installed:$missing; tests that need them are left out (log: $log)"
fi
exit 0

#!/bin/sh
# Debian's packages for the devcluster, where they can be installed. Starts nothing: a policy file keeps the packages'
# own services down while they are installed.
set -u
packages="slurmctld slurmd slurm-client munge slurmdbd mariadb-server"

PATH="$PATH:/usr/sbin"
missing=
for program in slurmctld slurmd scontrol munged slurmdbd mariadbd; do
    command -v $program >/dev/null || missing="$missing $program"
done
if [ -z "$missing" ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Slurm is not installed and can't be from here: its tests will be skipped. As root: apt-get install $packages"
    exit 0
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
echo "installing $packages"
apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages \
    >/dev/null || echo "the packages could not be installed: the Slurm tests will be skipped"

#!/bin/sh
# Debian's Chromium, in which the tests look at the pages of reports, where it can be installed.
set -u
for program in chromium chromium-browser google-chrome; do
    if command -v $program >/dev/null; then
        exit 0
    fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Chromium is not installed and can't be from here: its tests will be skipped. As root: apt-get install chromium"
    exit 0
fi
echo "installing chromium"
apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
    >/dev/null || echo "chromium could not be installed: its tests will be skipped"

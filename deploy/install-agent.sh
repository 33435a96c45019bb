#!/bin/sh
# Installs an edge agent as a service on a device with systemd: a Raspberry Pi, a Jetson, any Linux machine.
#
#   sudo deploy/install-agent.sh --server cloud.example:50051 --token-file token.txt
#
# It makes, in this order, and says each step before it does it:
#   /opt/ecavg                  a Python environment with PyTorch and ecavg
#   /etc/ecavg/edge-agent.toml  the configuration, if there is none yet
#   /etc/ecavg/join-token       the token, readable by root alone
#   /etc/systemd/system/edge-agent.service   the service, with a user of its own that systemd makes, started
# It may be run again, also to update: all stays that is there, but the packages, the unit and a token that
# is given.
set -eu

usage() {
  cat <<'USAGE'
usage: install-agent.sh --server HOST:PORT [--token-file FILE] [--package WHAT] [--torch-index URL]
                        [--root DIR] [--dry-run]

--server HOST:PORT  the cloud server of this device
--token-file FILE   a join token, as `cloud-server token create` prints it; without it an empty file is made,
                    which is enough for a device that has enrolled
--package WHAT      what pip installs: a wheel, or a folder with the sources; without it, the sources that this
                    script belongs to
--torch-index URL   where PyTorch comes from; without this, PyTorch's index of wheels for CPUs. Empty: with
                    the package, from pip's own index
--root DIR          install below DIR and start nothing; for an image of a system, and for tests
--dry-run           say what would be done, and do nothing
USAGE
}

fail() { # message
  echo "install-agent.sh: $1" >&2
  exit "${2:-2}"
}

# Says a command, and runs it unless this is a dry run.
run() {
  echo "+ $*"
  [ -n "$dry_run" ] || "$@"
}

# Writes standard input to a file, which appears whole and with its mode.
write() { # mode path
  echo "+ write $2 (mode $1)"
  if [ -n "$dry_run" ]; then
    cat > /dev/null
    return
  fi
  (umask 077 && cat > "$2.new")
  chmod "$1" "$2.new"
  mv "$2.new" "$2"
}

here=$(cd "$(dirname "$0")" && pwd)
server='' token_file='' package=$(dirname "$here") root='' dry_run=''
torch_index=https://download.pytorch.org/whl/cpu
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --server | --token-file | --package | --torch-index | --root) ;;
    *) usage >&2; fail "unknown option: $1" ;;
  esac
  [ $# -ge 2 ] || fail "$1 needs a value"
  case $1 in
    --server) server=$2 ;;
    --token-file) token_file=$2 ;;
    --package) package=$2 ;;
    --torch-index) torch_index=$2 ;;
    --root) root=${2%/} ;;
  esac
  shift 2
done

# What is needed, before anything changes.
[ -n "$server" ] || { usage >&2; fail "--server is missing"; }
expr "$server" : '[][A-Za-z0-9.:_-]*:[0-9][0-9]*$' > /dev/null || fail "--server must be HOST:PORT, not $server"
[ -z "$token_file" ] || [ -r "$token_file" ] || fail "$token_file cannot be read"
[ -r "$here/systemd/edge-agent.service" ] || fail "$here/systemd/edge-agent.service is missing"
[ "$(getconf LONG_BIT)" = 64 ] || fail "PyTorch needs a system of 64 bits, this one has $(getconf LONG_BIT)" 1
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed" 1
python3 -c 'import ensurepip, venv' || fail "Python's venv is missing: apt-get install python3-venv" 1
if [ -z "$root$dry_run" ]; then
  [ "$(id -u)" = 0 ] || fail "must be run as root: with sudo, or with --dry-run"
  command -v systemctl > /dev/null || fail "there is no systemd here" 1
fi

environment=$root/opt/ecavg
settings=$root/etc/ecavg
units=$root/etc/systemd/system

# 1. The packages. PyTorch comes first, so that ecavg finds it installed.
[ -x "$environment/bin/pip" ] || run python3 -m venv "$environment"
if [ -n "$torch_index" ]; then
  run "$environment/bin/pip" install --upgrade --index-url "$torch_index" torch torchvision
fi
run "$environment/bin/pip" install --upgrade "$package"

# 2. The configuration and the token.
run install -d -m 755 "$settings" "$units"
if [ -e "$settings/edge-agent.toml" ]; then
  echo "= $settings/edge-agent.toml stays as it is"
else
  echo "server = \"$server\"" | write 644 "$settings/edge-agent.toml"
fi
if [ -n "$token_file" ]; then
  write 600 "$settings/join-token" < "$token_file"
elif [ ! -e "$settings/join-token" ]; then
  write 600 "$settings/join-token" < /dev/null
fi

# 3. The service.
write 644 "$units/edge-agent.service" < "$here/systemd/edge-agent.service"
[ -z "$root" ] || exit 0
run systemctl daemon-reload
run systemctl enable edge-agent
run systemctl restart edge-agent
echo "= what it does: journalctl --follow --unit edge-agent"

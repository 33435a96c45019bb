#!/usr/bin/env bash
# Brings docker-compose.yml up under Podman on a Debian machine that has no container engine's daemon and
# no image registry, waits for the proof (a published round, every Prometheus target up), takes it down.
#
#   sudo tests/compose/podman_up.sh
#
# Needs the packages podman, runc, debootstrap, prometheus, and podman-compose 1.1 or newer, which knows profiles:
# that of Debian 12 does not (pip install podman-compose). pip inside the builds uses
# the configuration of the caller's pip; TORCH_INDEX_URL and ECAVG_ROUNDS are docker-compose.yml's.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CONTAINERS_CONF=$work/containers.conf
# Settings that also work where this machine is itself a container.
cat > "$CONTAINERS_CONF" <<'CONF'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF

# Stands in for Docker Hub's python:3.11-slim.
make_base_image() {
  podman image exists localhost/python:3.11-slim && return
  local mirror
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Component: main' | head -n 1)
  debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
    bookworm "$work/base" "$mirror"
  tar -C "$work/base" -c . | podman import - localhost/python:3.11-slim
  rm -rf "$work/base"
}

# Stands in for Docker Hub's image, with the Prometheus that this machine has.
make_prometheus_image() {
  local image
  image=localhost/$(sed -n 's/^ *image: \(prom\/prometheus:.*\)/\1/p' docker-compose.yml)
  podman image exists "$image" && return
  mkdir "$work/prometheus"
  cp "$(command -v prometheus)" "$work/prometheus/"
  podman build --tag "$image" --file - "$work/prometheus" <<'DOCKERFILE'
FROM localhost/python:3.11-slim
COPY prometheus /bin/prometheus
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
DOCKERFILE
}

# The caller's pip options as one file for the builds, and the local folders that they name.
pip_volumes() {
  python3 -m pip config list | python3 tests/compose/pip_conf.py "$work/pip.conf"
}

build_image() { # target tag
  podman build --format docker --network host "${volumes[@]}" \
    --build-arg "TORCH_INDEX_URL=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}" \
    --file deploy/Dockerfile --target "$1" --tag "localhost/$2" .
}

check_health() {
  local name
  for name in $(podman ps --filter "label=com.docker.compose.project.working_dir=$PWD" --format '{{.Names}}'); do
    [[ $name == *prometheus* ]] && continue # its stand-in has no check
    podman healthcheck run "$name"
    echo "$name is healthy"
  done
}

take_down() {
  podman-compose down --volumes > "$work/down.log" 2>&1 || cat "$work/down.log"
  rm -rf "$work"
}

make_base_image
make_prometheus_image
mapfile -t volumes < <(pip_volumes)
build_image server ecavg/cloud-server
build_image agent ecavg/edge-agent
trap take_down EXIT
podman-compose up -d > "$work/up.log" 2>&1 || { cat "$work/up.log"; exit 1; }
# podman-compose says more than it was asked.
ECAVG_SCRAPE_TOKEN=$(podman-compose exec -T cloud-server cat /scrape/token 2> /dev/null | sed -n '/^.\{44\}$/p')
export ECAVG_SCRAPE_TOKEN
python3 tests/compose/check_stack.py || { podman-compose logs 2>&1 | tail -n 100; exit 1; }
check_health

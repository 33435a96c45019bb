"""`edge-agent doctor` and `cloud-server doctor`: each check has a case in which it is wrong."""

import socket
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from common import tls
from tests.hostile.audit import snapshot
from tests.processes import Cluster, Command, cluster_in, free_port


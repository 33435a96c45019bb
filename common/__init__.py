"""What both sides must agree on."""

import os

# PyTorch's threads wait for each other after every operation. By default they wait busily, and when
# several agents, or an agent and a trainer, share the cores, a step of a small model takes a hundred
# times as long as it should (measured: 400 steps of an MLP, two processes on two busy cores: 141 s,
# and 1.2 s with this). OpenMP reads it when PyTorch is imported, so it must be set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# gRPC writes a line to stderr, past our log, for every handshake that fails and every call that it cannot
# read: whoever reaches the port could fill a disk with them. What concerns us it raises.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

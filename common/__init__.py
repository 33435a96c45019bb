"""The code that the edge agent and the cloud server share."""

import os

# PyTorch's threads wait for each other after every operation. By default the threads wait in a busy loop.
# When several processes share the cores, a step of a small model then takes a hundred times as long:
# 400 steps of an MLP, in two processes on two busy cores, took 141 s by default and 1.2 s with this setting.
# OpenMP reads the variable when PyTorch is imported, so the variable must be set before that import.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY") or "PASSIVE"

# gRPC would write one line to stderr, past our log, for every failed handshake and every unreadable call.
# Anyone who reaches the port could fill a disk with such lines. The errors that matter to us are raised.
os.environ["GRPC_VERBOSITY"] = os.environ.get("GRPC_VERBOSITY") or "NONE"

"""The gRPC server: its port, its interceptor, health checking and reflection."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ecavg.cloud_server.desk import Desk
from ecavg.cloud_server.door.admission import Admission
from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.door.connections import Connections
from ecavg.cloud_server.door.limits import CallLimits
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.servicer import SERVICE_NAME, ECAvgServicer
from ecavg.common import rpc
from ecavg.common.addresses import Address
from ecavg.common.errors import UsageError

# Calls are turned away, before anyone looks at them, where there are more on average over all connections.
MAX_CALLS_PER_CONNECTION = 4


class GrpcServer:
    """The gRPC server with our service, health checking and reflection.

    Args:
        authority: who has enrolled; None: the server speaks plaintext.
        max_connections: how many connections there may be.
        calls_per_second: how often one agent, or all bearers of one token, may call in the long run.
    """

    def __init__(
        self,
        metrics: ServerMetrics,
        authority: Authority | None,
        *,
        max_connections: int,
        calls_per_second: float,
    ) -> None:
        self._metrics = metrics
        self._authority = authority
        self._max_connections = max_connections
        self._admission = Admission(authority, CallLimits(calls_per_second))
        self._server = grpc.aio.server(
            interceptors=[rpc.RefusingInterceptor(metrics.observe_rpc, self._admission)],
            options=rpc.server_options(max_connections),
            maximum_concurrent_rpcs=MAX_CALLS_PER_CONNECTION * max_connections,
        )
        self._port = 0
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    def bind(self, host: str, port: int) -> int:
        """Take the port, and return its number; calls are answered from start() on.

        Raises:
            UsageError: nobody can listen on the address.
        """
        address = str(Address(host, port))
        try:
            if self._authority is None:
                self._port = self._server.add_insecure_port(address)
            else:
                credentials = rpc.server_credentials(self._authority.material)
                self._port = self._server.add_secure_port(address, credentials)
            return self._port
        except RuntimeError as error:
            raise UsageError(
                f"cannot listen on {address}: is it in use? choose another --host or --port,"
                " or --port 0 for a free one"
            ) from error

    async def start(self, desk: Desk) -> None:
        """Answer calls from now on."""
        ECAvgServicer(desk, self._authority).add_to(self._server)
        for service in (SERVICE_NAME, ""):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def guard(self) -> None:
        """Cut off agents that are revoked, and keep room for connections, for as long as this runs."""
        connections = Connections(
            self._port,
            self._max_connections,
            lambda: self._admission.addresses_in_use,
            self._metrics.count_connections_ended,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._admission.cut_off_revoked())
            tasks.create_task(connections.keep_room())

    async def stop(self, grace_seconds: float) -> None:
        """End all calls; those under way have `grace_seconds` to end by themselves."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)

"""Admission: who may make a call is decided here, once, before the servicer sees the call.

| the transport shows | may call |
| --- | --- |
| an agent's certificate | everything but `Enroll`, as the agent that the certificate names |
| a join token's certificate | `Enroll` |
| nothing: a server with `--insecure` | everything else, as the agent that the metadata name |

How often, and how much at once, each caller may call is decided in cloud_server/door/limits.py.
"""

import asyncio
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from contextvars import ContextVar

import structlog

from ecavg.cloud_server.door.authority import Authority, Holder, revocation
from ecavg.cloud_server.door.instances import Instances
from ecavg.cloud_server.door.limits import CallLimits
from ecavg.common.config import AGENT_ID_PATTERN
from ecavg.common.errors import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    Reason,
    Refusal,
    UnavailableError,
    second_device,
)
from ecavg.common.rpc import AGENT_ID_KEY, INSTANCE_KEY, Peer

# An open stream outlives its agent's revocation by so much at most.
POLL_SECONDS = 0.2

# A stranger on a server without TLS can name any number of agents and instances.
_MAX_ABSENT = 4096
_MAX_INSTANCE_ID = 64

_ENROLL, _WATCH = "Enroll", "Watch"
_AGENT_ID = re.compile(AGENT_ID_PATTERN)
_CALLER: ContextVar[Holder] = ContextVar("caller")

_Task = asyncio.Task[object]

log = structlog.get_logger()


def calling_agent() -> str:
    """Return the id of the agent whose call is being answered.

    Raises:
        InvalidError: the call names no agent.
    """
    agent_id = _CALLER.get().agent_id
    if agent_id is None:
        raise InvalidError(
            f"the metadata {AGENT_ID_KEY} must be 1 to 64 letters, digits, '.', '_' or '-',"
            " the first a letter or digit"
        )
    return agent_id


def token_in_use() -> str:
    """Return the id of the join token with which the caller enrolls.

    Raises:
        ForbiddenError: the caller shows no token.
    """
    token_id = _CALLER.get().token_id
    if token_id is None:
        raise ForbiddenError("only the holder of a join token enrolls", Reason.TOKEN)
    return token_id


class Admission:
    """The gate through which every call comes, and the calls that are open.

    Args:
        authority: the record of enrolled agents; None on a server without TLS, which trusts the metadata.
        limits: the limits of each agent, and of all holders of one join token together.
    """

    def __init__(self, authority: Authority | None, limits: CallLimits) -> None:
        self._authority = authority
        self._limits = limits
        self._addresses: Counter[str] = Counter()
        self._open: defaultdict[str, set[_Task]] = defaultdict(set)
        # Why calls were cut off that have not ended yet.
        self._cut_off: dict[_Task, Refusal] = {}
        # The open Watches of each agent that has one, with the instance that has opened each.
        self._watches: defaultdict[str, dict[_Task, str]] = defaultdict(dict)
        # The instances of these agents, and of others, of which the last to leave comes last.
        self._instances: dict[str, Instances] = {}
        self._instances_of_absent: OrderedDict[str, Instances] = OrderedDict()

    @contextmanager
    def __call__(self, method: str, peer: Peer) -> Iterator[None]:
        """Admit a call, and count the call as open until it ends.

        Raises:
            UnauthenticatedError: this server has not issued the certificate, or the certificate has expired.
            ForbiddenError: the caller may not make this call, or was revoked during the call.
            ConflictError: another device, which has the same identity, has been here first.
            UnavailableError: another process of the agent has opened a Watch during this Watch.
            BusyError: the caller calls too often, or has too many open calls.
        """
        holder = self._holder(peer)
        if holder.token_id is not None and method != _ENROLL:
            raise ForbiddenError("the holder of a join token may enroll, and nothing else", Reason.TOKEN)
        _CALLER.set(holder)
        if holder.agent_id:
            # Each call has a context of its own, so that nothing has to be unbound.
            structlog.contextvars.bind_contextvars(agent_id=holder.agent_id)
        caller = f"token {holder.token_id}" if holder.token_id else f"agent {holder.agent_id or ''}"
        with (
            self._limits.call(caller),
            self._call_counted(holder.agent_id or ""),
            self._address_counted(peer.address),
            self._watch_counted(method, holder.agent_id, peer.instance_id),
        ):
            yield

    @property
    def addresses_in_use(self) -> Set[str]:
        """Return the addresses of the connections that carry an open call, as gRPC writes them."""
        return self._addresses.keys()

    async def cut_off_revoked(self) -> None:
        """End the open calls of revoked agents, again and again until this task is cancelled."""
        while self._authority:
            try:
                revoked = self._authority.revoked_agents()
            except Exception:
                # The task must survive, to end open calls later. New calls of revoked agents do not depend
                # on this task.
                log.exception("revocations_not_read")
                revoked = set()
            for agent_id in revoked & self._open.keys():
                log.warning("agent_cut_off", agent_id=agent_id, num_calls=len(self._open[agent_id]))
                for task in self._open[agent_id]:
                    self._cut(task, ForbiddenError(revocation(agent_id)))
            await asyncio.sleep(POLL_SECONDS)

    def _holder(self, peer: Peer) -> Holder:
        """Return the caller: the holder of the certificate, or over plaintext the agent in the metadata."""
        if self._authority is None:
            return Holder(peer.claimed_id if _AGENT_ID.fullmatch(peer.claimed_id) else None, None)
        if peer.certificate is None:
            raise ForbiddenError("this server answers over TLS only", Reason.NOT_ENROLLED)
        return self._authority.holder(peer.certificate)

    @contextmanager
    def _address_counted(self, address: str) -> Iterator[None]:
        """Count the address of the connection as one with an open call."""
        self._addresses[address] += 1
        try:
            yield
        finally:
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    @contextmanager
    def _watch_counted(self, method: str, agent_id: str | None, instance_id: str) -> Iterator[None]:
        """Count the call if it is a Watch that shows its instance, and end the Watches of other instances."""
        if method != _WATCH or not agent_id or not instance_id:
            yield
            return
        if len(instance_id) > _MAX_INSTANCE_ID:
            raise InvalidError(f"the metadata {INSTANCE_KEY} has at most {_MAX_INSTANCE_ID} characters")
        task = asyncio.current_task()
        assert task
        watches = self._watches[agent_id]
        instances = self._instances[agent_id] = self._instances_of(agent_id)
        try:
            self._check_instance(agent_id, instance_id)
            watches[task] = instance_id
            yield
        finally:
            watches.pop(task, None)
            if instance_id not in watches.values():
                instances.leave(instance_id)
            if not watches:
                del self._watches[agent_id]
                self._instances_of_absent[agent_id] = self._instances.pop(agent_id)
                if len(self._instances_of_absent) > _MAX_ABSENT:
                    self._instances_of_absent.popitem(last=False)

    def _instances_of(self, agent_id: str) -> Instances:
        return self._instances.get(agent_id) or self._instances_of_absent.pop(agent_id, None) or Instances()

    def _check_instance(self, agent_id: str, instance_id: str) -> None:
        """End the Watches of the agent's other instances.

        Raises:
            ConflictError: this instance is a second device.
        """
        instances = self._instances[agent_id]
        is_first = instances.enter(instance_id)
        for other, its_instance in self._watches[agent_id].items():
            if instances.is_refused(its_instance):
                self._cut(other, ConflictError(second_device(agent_id), Reason.IDENTITY_IN_USE))
            elif is_first and its_instance != instance_id:
                self._cut(other, UnavailableError(f"another process of agent {agent_id} has taken over"))
        if not is_first:
            log.warning("identity_in_use_twice", agent_id=agent_id, advice=second_device(agent_id))
            raise ConflictError(second_device(agent_id), Reason.IDENTITY_IN_USE)

    def _cut(self, task: _Task, refusal: Refusal) -> None:
        """End a call with this refusal, unless it is being ended already."""
        if task not in self._cut_off:
            self._cut_off[task] = refusal
            task.cancel()

    @contextmanager
    def _call_counted(self, agent_id: str) -> Iterator[None]:
        """Count the call as open, and end a call that was cut off with the refusal that says why."""
        task = asyncio.current_task()
        assert task
        self._open[agent_id].add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut_off:
                raise
            task.uncancel()
            raise self._cut_off[task] from None
        finally:
            self._cut_off.pop(task, None)
            self._open[agent_id].discard(task)
            if not self._open[agent_id]:
                del self._open[agent_id]

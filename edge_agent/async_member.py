"""One device's part in a run with `mode = "async"`, in which no round waits for it.

The member finishes a pre-training whatever rounds open meanwhile, and contributes the result to the round
that is open then, or to the next while the trainer works. Only after that it takes the newest global model.
What it has begun, and to which round it has offered the result, is on disk: a restart goes on with it, and
the result counts once.
"""

from dataclasses import replace
from functools import partial

import structlog

from ecavg.common.errors import ForbiddenError, NotFoundError, Reason, Refusal, UnauthenticatedError
from ecavg.common.faults import Point, crash_point
from ecavg.common.run_state import Outcome, Phase, RunState, Verdict
from ecavg.common.transfer import Blob
from ecavg.edge_agent.member import Member, Offer
from ecavg.edge_agent.state import Begun, Trained

log = structlog.get_logger()


class AsyncMember(Member):
    """A member that contributes to whichever round is open when it has finished."""

    _offers_later = True

    def _is_called_for(self, state: RunState) -> bool:
        return super()._is_called_for(state) or (self._is_to_finish(state) and self._data.is_ready)

    async def _act_on(self, state: RunState) -> bool:
        """Do what the state calls for: to finish what was begun comes before a newer model."""
        if self._round_taken(state) is not None:
            return await super()._act_on(state)
        if self._is_to_finish(state) and not self._withdrawals.are_urgent(state):
            await self._contribute_unless_in_vain(state)
            return True
        if self._disk.progress.begun and not self._is_to_finish(state):
            await self._save(begun=None)
        return await super()._act_on(state)

    def _is_to_finish(self, state: RunState) -> bool:
        return self._disk.progress.begun is not None and not self._is_in_vain(state)

    def _is_in_vain(self, state: RunState) -> bool:
        """Return True after the last round, too: the server waits until its model is taken."""
        return state.run_over or state.last_round_over

    # ------------------------------------------------------------------ contribute

    async def _contribute(self, state: RunState) -> None:
        """Finish what was begun, or begin with this state, and contribute it to the round that is open."""
        if state.is_warm_up:
            await super()._contribute(state)
            return
        if self._disk.progress.begun is None:
            await self._save(begun=_begun_with(state))
        try:
            verdict = await self._earlier_verdict() or await self._finish(state)
        except NotFoundError as error:
            # The agent was away for so long that the server has given up what it started from.
            self._display.message(f"starting again from the newest model: {error}")
            await self._save(begun=None)
            return
        crash_point(Point.AGENT_CONTRIBUTED)
        await self._end_begun(verdict)

    async def _earlier_verdict(self) -> Verdict | None:
        """Return the answer to what an earlier life of this agent has offered; None: it is to be offered."""
        begun, trained = self._begun, self._disk.progress.trained
        if begun.offered_to is None or begun.offered is None or trained is None:
            return None
        offer = Offer(begun.offered_to, begun.offered, None, trained.initial_weights, trained.score)
        try:
            verdict = await self._commit(offer)
        except (UnauthenticatedError, ForbiddenError):
            raise
        except Refusal as error:
            log.warning("offering_again", round=begun.offered_to, reason=str(error))
            return None
        return None if verdict.outcome is Outcome.LATE else verdict

    async def _finish(self, state: RunState) -> Verdict:
        """Pre-train from where this agent has begun, and offer the result until it is taken or refused."""
        start = _state_at(self._begun, state)
        await self._read_again()
        async with self._uploading_shards() as uploading:
            trained = await self._pretrain(start)
            closed_round = self._disk.progress.contributed_round
            while True:
                current = await self._news.next(partial(_is_open_after, closed_round))
                offer = await self._offer_to(current, start, trained)
                verdict = await self._send(offer, uploading)
                if verdict.outcome is not Outcome.LATE:
                    return verdict
                # The news of that may still be on its way.
                closed_round = current.round

    async def _offer_to(self, current: RunState, start: RunState, trained: Trained) -> Offer:
        """Return the offer to the current round, once it is on disk that this is what was offered.

        What rounding takes away belongs to the round that takes the contribution.
        """
        start = replace(start, counted_round=current.counted_round)
        path, weights = await self._encoded(trained.model_copy(update={"round": current.round}), start)
        await self._save_begun(offered_to=current.round, offered=weights)
        return Offer(current.round, weights, path, trained.initial_weights, trained.score)

    @property
    def _round_offered(self) -> int | None:
        begun = self._disk.progress.begun
        return begun.offered_to if begun else None

    async def _end_taken(self, number: int) -> None:
        begun = self._disk.progress.begun
        if begun and begun.offered_to == number:
            await self._end_begun(Verdict(Outcome.ACCEPTED))
        else:
            await super()._end_taken(number)

    async def _end_begun(self, verdict: Verdict) -> None:
        """Save that the contribution is answered; one that was too old leaves its round open to another."""
        begun, trained = self._begun, self._disk.progress.trained
        assert begun.offered_to is not None
        assert trained
        number = begun.offered_to
        is_too_old = verdict.reason is Reason.INITIAL_WEIGHTS and begun.round < number
        await self._end_contribution(
            number,
            verdict,
            contributed_round=number - 1 if is_too_old else number,
            begun=None,
            trained=trained.model_copy(update={"round": number}),
        )

    # ------------------------------------------------------------------ what was begun

    @property
    def _begun(self) -> Begun:
        begun = self._disk.progress.begun
        assert begun
        return begun

    async def _save_begun(self, *, offered_to: int, offered: Blob) -> None:
        changes = {"offered_to": offered_to, "offered": offered}
        await self._save(begun=self._begun.model_copy(update=changes))


def _is_open_after(closed_round: int, state: RunState) -> bool:
    return state.phase is Phase.COLLECTING and state.round > closed_round


def _begun_with(state: RunState) -> Begun:
    """Return what an agent that begins now is to finish."""
    return Begun(
        round=state.round,
        initial_weights=state.initial_weights,
        has_full_curve=state.has_full_curve,
        initial_rest=state.initial_rest,
    )


def _state_at(begun: Begun, state: RunState) -> RunState:
    """Return the state with the round and the initial weights with which the agent has begun."""
    is_the_same = begun.initial_weights == state.initial_weights
    return replace(
        state,
        round=begun.round,
        initial_weights=begun.initial_weights,
        initial_encoded=state.initial_encoded if is_the_same else None,
        # An earlier version of this agent has not kept it.
        initial_rest=begun.initial_rest or state.initial_rest,
        has_full_curve=begun.has_full_curve,
    )

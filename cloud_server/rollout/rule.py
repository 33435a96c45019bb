"""The rule of a canary: which agents are in it, and what their reports say of the model."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

from ecavg.cloud_server.disk.tables import ReportRow
from ecavg.common.seeds import derive_seed


@dataclass(frozen=True)
class CanaryRule:
    """How a new model is tried out."""

    # The seed of the run, from which each agent has a lot in each round.
    seed: int
    # This part of the agents is drawn.
    fraction: float
    # The probability at which a model that is as good as the one before is withdrawn.
    level: float
    # So long reports are waited for.
    seconds: float
    # What becomes of the model if fewer than half of the agents have reported until then.
    on_too_few: Literal["withdraw", "release"]

    def draw(self, number: int, agent_ids: Collection[str]) -> frozenset[str]:
        """Return the agents that have the model of a round before all others, at least one.

        The lowest lots are drawn, so the canary depends only on the seed and on who is there.
        """
        size = max(1, math.ceil(self.fraction * len(agent_ids)))
        lots = sorted(agent_ids, key=lambda agent_id: (self._lot(number, agent_id), agent_id))
        return frozenset(lots[:size])

    def judge(self, reports: Sequence[ReportRow]) -> "Verdict":
        """Return whether the model is for all agents, by the reports of the canary.

        Each device has compared the new model, after its local adaptation if there was one, with the model
        that it used before, on its held-out examples. Its report has the sum of the differences of the
        scores, and the sum of their squares. Both are summed over all devices. With d for the differences

            z = Σd / √Σd²

        is about standard normal where both models are equally good, and the model is worse if z is below the
        quantile of `level`: a one-sided test. Where an example is right or wrong, a difference is 1, -1 or 0,
        and z² is McNemar's statistic (gained - lost)² / (gained + lost) (Psychometrika 12, 1947). Otherwise
        this is the paired z test with the second moment in the place of the variance, which is what it is
        under the hypothesis that is tested.

        A device without a model before has nothing to compare, and says nothing against the model.
        """
        total = math.fsum(row.difference_total or 0.0 for row in reports)
        squares = math.fsum(row.difference_squares or 0.0 for row in reports)
        num_examples = sum(row.num_held_out for row in reports if row.difference_total is not None)
        bound = NormalDist().inv_cdf(self.level)
        # Two models that do not differ on any example are equally good.
        z = total / math.sqrt(squares) if squares else 0.0
        is_worse = z < bound
        return Verdict(
            not is_worse,
            f"{'worse' if is_worse else 'not worse'} for the canary: z = {z:.2f}, and {bound:.2f} is allowed,"
            f" on {num_examples} held-out examples of {len(reports)} agents",
        )

    def judge_too_few(self, num_reports: int, num_agents: int) -> "Verdict":
        """Return what becomes of a model on which fewer than half of the canary have reported in time."""
        return Verdict(
            self.on_too_few == "release",
            f"{num_reports} of {num_agents} agents of the canary have reported"
            f" within {self.seconds:g} seconds",
        )

    def _lot(self, number: int, agent_id: str) -> int:
        return derive_seed(self.seed, "canary", number, agent_id)


class Verdict(NamedTuple):
    """How a canary has ended."""

    is_released: bool
    # Why, in one line.
    reason: str

"""Selection: the candidates for the start of a fine-tune, and the choice of the best one on held-out data.

The candidates of a round (run.candidates):

- average: the agents' weights, aggregated as they are;
- aligned: the same, with every agent's neurons in the order of the first (alignment.py);
- greedy_soup: the mean of the aligned weights of some agents; beginning with the best agent, each further
  agent is added if that makes the mean no worse (Wortsman et al., arXiv 2203.05482, recipe 1);
- best_agent: the weights of the best agent, as they are;
- previous: the weights from which the round started, from the second round on, or after a warm-up.

No agent has trained on the held-out data, see common/shards.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import structlog
from torch import nn

from ecavg.cloud_server.jobs import TRAINED, TrainedName
from ecavg.cloud_server.trainer.aggregation import aggregate
from ecavg.cloud_server.trainer.alignment import align_all
from ecavg.cloud_server.trainer.measuring import Measuring
from ecavg.cloud_server.trainer.members import Member
from ecavg.cloud_server.trainer.permutations import (
    NotTraceable,
    PermutationGroup,
    apply,
    permutation_groups,
)
from ecavg.common.comparison import compare
from ecavg.common.dataset import DatasetSpec
from ecavg.common.evaluation import Evaluation
from ecavg.common.models import empty_inputs, shared_part
from ecavg.common.seeds import derive_seed
from ecavg.common.tasks.task import task_of
from ecavg.common.weights import StateDict, copy_into, load_into, read_state_dict, write_state_dict

# A callback that gets the number of tensors that are done, and the number of all tensors.
OnTensor = Callable[[int, int], None]

# The candidates' weights: the aggregator, and the files that are aggregated.
Key = tuple[str, tuple[Path, ...]]

# A score and a negative loss: more is better, and the loss decides between equal scores.
Rank = tuple[float, float]

log = structlog.get_logger()


class Best(NamedTuple):
    """The best model so far."""

    name: str
    state_dict: StateDict
    # The evaluation on held-out data; None if there is no such data.
    evaluation: Evaluation | None


class Selection:
    """The maker of the candidates, which keeps the best of all models that it has measured.

    Args:
        measuring: measures what is in its model, into which each candidate is loaded in turn. This process is
            rank 0 of those that measure together.
        members: the members of the round, in agent-id order.
        previous: the file of the weights from which the round started; None in the first round.
        rest: the file of the cloud's values for the parts that do not travel; None if all parts do. Every
            candidate is measured with them.
        scratch: an existing folder for aligned weights.
        on_tensor: a callback that gets the numbers of done tensors and of all tensors of an aggregation.
    """

    def __init__(
        self,
        measuring: Measuring,
        members: Sequence[Member],
        previous: Path | None,
        *,
        scratch: Path,
        rest: Path | None = None,
        on_tensor: OnTensor = lambda *_: None,
    ) -> None:
        # The score of each candidate that was measured, by name.
        self.scores: dict[str, float] = {}
        # The ids of the agents in the greedy soup, the best agent first.
        self.soup: tuple[str, ...] = ()
        self.best: Best | None = None
        self._measuring = measuring
        self._model, self._run, self._data = measuring.model, measuring.run, measuring.data
        # The name of the figure that the scores are.
        self.metric = task_of(self._run).metric
        self._members = members
        self._previous = previous
        self._rest = rest
        self._scratch = scratch
        self._on_tensor = on_tensor
        # An evaluation has a score for each example, which is too much to keep for each of many agents.
        self._measured: dict[Key, Rank | None] = {}
        # The aggregate that was last loaded into the model, and the versions of the model's tensors then.
        self._filled: tuple[Key, list[tuple[int, int]]] | None = None

    def run(self, on_progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Make and measure all candidates; without held-out data, the first that can be made is the best.

        Args:
            on_progress: a callback that gets the numbers of done candidates and of all candidates.

        Raises:
            RunError: the contributions cannot be aggregated.
            OSError: a file cannot be read or written.
        """
        make = {
            "average": self._make_average,
            "aligned": self._make_aligned,
            "greedy_soup": self._make_greedy_soup,
            "best_agent": self._make_best_agent,
            "previous": self._make_previous,
        }
        names = self._run.candidates
        for done, name in enumerate(names, 1):
            make[name]()
            on_progress(done, len(names))
        # None of the candidates could be made, for example because the model cannot be aligned.
        if self.best is None:
            self._make_average()
        # The fine-tune needs the memory, and the other ranks.
        self.end()

    def offer(self, name: TrainedName) -> Evaluation | None:
        """Measure what the fine-tune has made of the start, and keep it if it may be published.

        The start is the best of several models on the held-out data, so that its score flatters it, and that
        of what was trained since does not. The start stays only if it is better beyond chance.

        Returns:
            The evaluation of the model; None if there is no held-out data: then it is kept.
        """
        evaluation = self.measure()
        if evaluation is None or self._may_follow(evaluation):
            self._keep(name, evaluation)
        return evaluation

    def measure(self) -> Evaluation | None:
        """Evaluate the model as it is on held-out data; return None if there is no such data."""
        return self._measuring.measure()

    def recompute_statistics(self) -> None:
        """Fit BatchNorm's running statistics to the weights in the model, which are an average."""
        self._measuring.recompute_statistics()

    def end(self) -> None:
        """Let the other ranks go on, which take part in all that is measured."""
        self._measuring.end()

    def take_best(self) -> Best:
        """Return the best model so far, and load its weights into the model."""
        assert self.best is not None
        copy_into(self._model, self.best.state_dict)
        return self.best

    # ------------------------------------------------------------------ the candidates

    def _make_average(self) -> None:
        """Aggregate the weights as they are."""
        self._offer_aggregate("average", self._members, self._run.aggregator)

    def _make_aligned(self) -> None:
        """Aggregate the aligned weights, if they can be aligned."""
        if self._aligned:
            self._offer_aggregate("aligned", self._aligned, self._run.aggregator)

    def _make_greedy_soup(self) -> None:
        """Make the greedy soup, if there are several members and held-out data to choose them by."""
        if len(self._members) < 2 or not len(self._data.held_out.targets):
            return
        soup = self._best_first[:1]
        for agent in self._best_first[1:]:
            if self._score_of([*soup, agent]) >= self._score_of(soup):
                soup.append(agent)
        self.soup = tuple(self._members[agent].agent_id for agent in soup)
        self._offer_aggregate("greedy_soup", self._chosen(soup), "mean")

    def _make_best_agent(self) -> None:
        """Take the weights of the best agent, if there is held-out data to choose it by."""
        if len(self._data.held_out.targets):
            self._offer_aggregate("best_agent", self._chosen(self._best_first[:1]), "mean")

    def _make_previous(self) -> None:
        """Measure the weights from which the round started, if there are any and there is held-out data.

        Without held-out data the first candidate wins, and this one must not win over the round's average.
        """
        if self._previous and len(self._data.held_out.targets):
            load_into(self._model, self._rest, self._previous)
            evaluation = self.measure()
            assert evaluation
            self._announce("previous", _rank(evaluation), evaluation)

    @cached_property
    def _best_first(self) -> list[int]:
        """Return the numbers of the agents, sorted by the score of their weights, the best one first."""
        every = range(len(self._members))
        return sorted(every, key=lambda agent: self._score_of([agent]), reverse=True)

    @cached_property
    def _aligned(self) -> list[Member] | None:
        """Return the members with their neurons in the order of the first; None if they cannot be aligned."""
        if len(self._members) < 2:
            return None
        try:
            groups = self._groups()
        except NotTraceable as error:
            log.warning("averaged_without_alignment", model=self._run.model, reason=str(error))
            return None
        if not groups:
            reason = "no neurons are known to be interchangeable"
            log.info("averaged_without_alignment", model=self._run.model, reason=reason)
        permutations = align_all(
            [item.weights_path for item in self._members],
            [item.coefficient for item in self._members],
            groups,
            seed=derive_seed(self._run.seed, "alignment"),
        )
        aligned = []
        for item, found in zip(self._members, permutations, strict=True):
            before = read_state_dict(item.weights_path)
            after = apply(groups, found, before)
            if any(after[name] is not before[name] for name in before):
                path = self._scratch / f"aligned-{item.agent_id}.safetensors"
                write_state_dict(after, path)
                item = replace(item, weights_path=path)
            aligned.append(item)
        return aligned

    def _groups(self) -> list[PermutationGroup]:
        """Return the permutation groups of which every tensor travels.

        A device would not put its own part of the model into another order, and neither would the cloud.

        Raises:
            NotTraceable: the groups of the model are not known, or none of them travels as a whole.
        """
        groups = _groups_of(self._model, self._run.spec)
        if not self._rest:
            return groups
        shared = shared_part(self._model, self._run)
        whole = [group for group in groups if all(place.tensor in shared for place in group.places)]
        if groups and not whole:
            raise NotTraceable("each group of neurons has a tensor that does not travel (share_parameters)")
        if len(whole) < len(groups):
            log.info("partly_aligned", num_groups=len(groups), num_that_travel=len(whole))
        return whole

    # ------------------------------------------------------------------ measuring and keeping

    def _offer_aggregate(self, name: str, members: Sequence[Member], aggregator: str) -> None:
        """Make an aggregate a candidate; it is measured, also if it is known, where it is the best so far."""
        key = _key(members, aggregator)
        evaluation = None
        if key not in self._measured or self._is_best(self._measured[key]):
            evaluation = self._evaluate(members, aggregator)
        self._announce(name, self._measured[key], evaluation)

    def _chosen(self, agents: Sequence[int]) -> list[Member]:
        """Return the members with these numbers: aligned ones for a mean of several, else as they are."""
        members = self._aligned if self._aligned and len(agents) > 1 else self._members
        return [members[agent] for agent in agents]

    def _score_of(self, agents: Sequence[int]) -> float:
        """Return the score of the mean of these agents on held-out data; there must be such data."""
        members = self._chosen(agents)
        key = _key(members, "mean")
        if key not in self._measured:
            self._evaluate(members, "mean")
        rank = self._measured[key]
        assert rank
        return rank[0]

    def _evaluate(self, members: Sequence[Member], aggregator: str) -> Evaluation | None:
        """Load the aggregate of the members into the model, and measure it."""
        self._fill(members, aggregator)
        evaluation = self.measure()
        self._measured[_key(members, aggregator)] = evaluation and _rank(evaluation)
        return evaluation

    def _fill(self, members: Sequence[Member], aggregator: str) -> None:
        """Load the aggregate of the members into the model; a single member's weights stay as they are."""
        key = _key(members, aggregator)
        if self._filled == (key, self._versions()):
            return
        self._load(members, aggregator)
        self._filled = key, self._versions()

    def _load(self, members: Sequence[Member], aggregator: str) -> None:
        """Do what `_fill` says, whatever the model holds."""
        if len(members) == 1:
            load_into(self._model, self._rest, members[0].weights_path)
            return
        # The order of a sum changes its last bits.
        members = sorted(members, key=lambda member: member.agent_id)
        state_dict = aggregate(
            [member.weights_path for member in members],
            [member.coefficient for member in members],
            self._run.model_copy(update={"aggregator": aggregator}),
            compared=[name for name, _ in self._model.named_parameters()],
            on_tensor=self._on_tensor,
        )
        copy_into(self._model, state_dict | (read_state_dict(self._rest) if self._rest else {}))
        self.recompute_statistics()

    def _versions(self) -> list[tuple[int, int]]:
        """Return numbers that change when a tensor of the model is replaced or written to."""
        tensors = self._model.state_dict(keep_vars=True).values()
        return [(id(tensor), tensor._version) for tensor in tensors]

    def _may_follow(self, evaluation: Evaluation) -> bool:
        """Return True if a model of the fine-tune with this evaluation takes the place of the best so far."""
        start = self.best
        if start is None or start.evaluation is None or start.name in TRAINED:
            return self._is_best(_rank(evaluation))
        # A fine-tune of no epochs has made nothing.
        is_another = _rank(evaluation) != _rank(start.evaluation)
        return is_another and not compare(start.evaluation.scores.numpy(), evaluation.scores.numpy()).is_worse

    def _is_best(self, rank: Rank | None) -> bool:
        """Return True if a model of this rank, None without held-out data, is the best model so far."""
        if self.best is None:
            return True
        return bool(rank and self.best.evaluation and rank > _rank(self.best.evaluation))

    def _keep(self, name: str, evaluation: Evaluation | None) -> None:
        """Keep a copy of the model as the best model so far."""
        copies = {key: tensor.detach().cpu().clone() for key, tensor in self._model.state_dict().items()}
        self.best = Best(name, copies, evaluation)

    def _announce(self, name: str, rank: Rank | None, evaluation: Evaluation | None) -> None:
        """Record a candidate's score, and keep the candidate if it is the best so far.

        If it is the best, then the model must hold its weights, and `evaluation` be theirs.
        """
        if self._is_best(rank):
            self._keep(name, evaluation)
        if rank:
            self.scores[name] = rank[0]


@lru_cache(maxsize=1)
def _groups_of(model: nn.Module, spec: DatasetSpec) -> list[PermutationGroup]:
    """Return the permutation groups of the network, which are found once for all rounds."""
    return permutation_groups(model, empty_inputs(spec))


def _rank(evaluation: Evaluation) -> Rank:
    return evaluation.score, -evaluation.loss


def _key(members: Sequence[Member], aggregator: str) -> Key:
    """Return a key for the aggregate of the members; for a single member, the aggregator does not matter."""
    paths = tuple(sorted(member.weights_path for member in members))
    return ("" if len(paths) == 1 else aggregator), paths

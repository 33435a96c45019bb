"""Selection: the models that a fine-tune may start from, and which of them does best on held-out data.

The candidates of a round (run.candidates):

- average: the agents' weights, aggregated as they are;
- aligned: the same, with every agent's neurons in the order of the first (alignment.py);
- greedy_soup: the aligned weights of those agents that make the mean better, beginning with the best
  one (Wortsman et al., arXiv 2203.05482, recipe 1);
- best_agent: the weights of one agent, as they are;
- previous: what the round started from, from the second round on.

No agent has trained on the held-out data: see common/shards.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import structlog
import torch
from torch import nn

from cloud_server.trainer.aggregation import aggregate
from cloud_server.trainer.alignment import align_all
from cloud_server.trainer.finetune import CombinedData
from cloud_server.trainer.members import Member
from cloud_server.trainer.permutations import NotTraceable, apply, permutation_groups
from common.config import RunConfig
from common.training import Evaluation, derive_seed, evaluate, recompute_statistics
from common.weights import StateDict, copy_into, load_into, read_state_dict, write_state_dict

OnTensor = Callable[[int, int], None]

log = structlog.get_logger()


class Best(NamedTuple):
    """The best model so far."""

    name: str
    state_dict: StateDict
    evaluation: Evaluation | None  # None: there is no data to measure it on


class Selection:
    """Makes the candidates, one at a time, and keeps the best of all models that it has measured.

    Args:
        model: of the run's structure, left with any weights; where it is when candidates are made.
        members: in agent-id order.
        previous: the weights that the round started from; None in the first round.
        scratch: an existing folder for aligned weights.
        on_tensor: told how many tensors of one aggregation, of how many, are done.
    """

    def __init__(
        self,
        model: nn.Module,
        run: RunConfig,
        members: Sequence[Member],
        previous: Path | None,
        data: CombinedData,
        *,
        device: torch.device,
        scratch: Path,
        on_tensor: OnTensor = lambda *_: None,
    ) -> None:
        self.accuracies: dict[str, float] = {}  # of the candidates that were measured
        self.soup: tuple[str, ...] = ()  # agent ids, the best one first
        self.best: Best | None = None
        self._model = model
        self._run = run
        self._members = members
        self._previous = previous
        self._data = data
        self._device = device
        self._scratch = scratch
        self._on_tensor = on_tensor
        self._measured: dict[tuple[str, tuple[Path, ...]], Evaluation | None] = {}

    def run(self, on_progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Make and measure all candidates; where nobody shared data, the first that can be made is the best.

        Args:
            on_progress: told how many candidates, of how many, are done.

        Raises:
            RunError: a contribution is not what it should be.
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
        if self.best is None:  # alignment alone was asked for, and cannot be done
            self._make_average()

    def offer(self, name: str) -> Evaluation | None:
        """Measure the model as it is, and keep it if it is the best so far, or if nobody can tell."""
        evaluation = self.measure()
        if evaluation is None or self._is_best(evaluation):
            self._keep(name, evaluation)
        return evaluation

    def measure(self) -> Evaluation | None:
        """How good the model is as it is; None: there is no data to measure it on."""
        if not len(self._data.held_out.labels):
            return None
        return evaluate(self._model, *self._data.held_out, spec=self._run.spec, device=self._device)

    def take_best(self) -> Best:
        """The best model so far, which is also what the model is left as."""
        assert self.best is not None
        copy_into(self._model, self.best.state_dict)
        return self.best

    # ------------------------------------------------------------------ the candidates

    def _make_average(self) -> None:
        self._offer_aggregate("average", self._members, self._run.aggregator)

    def _make_aligned(self) -> None:
        if self._aligned:
            self._offer_aggregate("aligned", self._aligned, self._run.aggregator)

    def _make_greedy_soup(self) -> None:
        """Only where there are some to choose among, and something to choose by."""
        if len(self._members) < 2 or not len(self._data.held_out.labels):
            return
        soup = self._best_first[:1]
        for agent in self._best_first[1:]:
            if self._accuracy_of([*soup, agent]) >= self._accuracy_of(soup):
                soup.append(agent)
        self.soup = tuple(self._members[agent].agent_id for agent in soup)
        self._offer_aggregate("greedy_soup", self._chosen(soup), "mean")

    def _make_best_agent(self) -> None:
        if len(self._data.held_out.labels):
            self._offer_aggregate("best_agent", self._chosen(self._best_first[:1]), "mean")

    def _make_previous(self) -> None:
        """Only where it can be measured: unmeasured it would come before an average of this round."""
        if self._previous and len(self._data.held_out.labels):
            load_into(self._model, self._previous)
            self._announce("previous", self.measure())

    @cached_property
    def _best_first(self) -> list[int]:
        """The agents by their own accuracy."""
        every = range(len(self._members))
        return sorted(every, key=lambda agent: self._accuracy_of([agent]), reverse=True)

    @cached_property
    def _aligned(self) -> list[Member] | None:
        """The contributions with their neurons in the order of the first; None: nothing to align."""
        if len(self._members) < 2:
            return None
        try:
            groups = permutation_groups(self._model, self._run.spec.image_shape)
        except NotTraceable as error:
            log.warning("averaged_without_alignment", model=self._run.model, reason=str(error))
            return None
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

    # ------------------------------------------------------------------ measuring and keeping

    def _offer_aggregate(self, name: str, members: Sequence[Member], aggregator: str) -> None:
        """One aggregate may be a candidate under several names: it is measured once."""
        key = _key(members, aggregator)
        is_known = key in self._measured
        if not is_known or self._is_best(self._measured[key]):
            self._fill(members, aggregator)
        if not is_known:
            self._measured[key] = self.measure()
        self._announce(name, self._measured[key])

    def _chosen(self, agents: Sequence[int]) -> list[Member]:
        """What these make a mean of: one alone has nobody to be aligned with."""
        members = self._aligned if self._aligned and len(agents) > 1 else self._members
        return [members[agent] for agent in agents]

    def _accuracy_of(self, agents: Sequence[int]) -> float:
        """Of their mean, on held-out data, which there must be."""
        members = self._chosen(agents)
        key = _key(members, "mean")
        if key not in self._measured:
            self._fill(members, "mean")
            self._measured[key] = self.measure()
        evaluation = self._measured[key]
        assert evaluation
        return evaluation.accuracy

    def _fill(self, members: Sequence[Member], aggregator: str) -> None:
        """Load the model with the members' aggregate; a single one stays as it is."""
        if len(members) == 1:
            load_into(self._model, members[0].weights_path)
            return
        members = sorted(members, key=lambda member: member.agent_id)  # the order shows in the last bits
        state_dict = aggregate(
            [member.weights_path for member in members],
            [member.coefficient for member in members],
            self._run.model_copy(update={"aggregator": aggregator}),
            compared=[name for name, _ in self._model.named_parameters()],
            on_tensor=self._on_tensor,
        )
        copy_into(self._model, state_dict)
        if self._run.recompute_statistics:
            recompute_statistics(
                self._model,
                self._data.train.images,
                spec=self._run.spec,
                device=self._device,
                seed=derive_seed(self._run.seed, "statistics"),
            )

    def _is_best(self, evaluation: Evaluation | None) -> bool:
        if self.best is None:
            return True
        known = self.best.evaluation
        return bool(evaluation and known and _rank(evaluation) > _rank(known))

    def _keep(self, name: str, evaluation: Evaluation | None) -> None:
        copies = {key: tensor.detach().cpu().clone() for key, tensor in self._model.state_dict().items()}
        self.best = Best(name, copies, evaluation)

    def _announce(self, name: str, evaluation: Evaluation | None) -> None:
        """Note a candidate's accuracy, and keep the model, which is this candidate, if it is the best."""
        if self._is_best(evaluation):
            self._keep(name, evaluation)
        if evaluation:
            self.accuracies[name] = evaluation.accuracy


def _rank(evaluation: Evaluation) -> tuple[float, float]:
    """More is better; the loss decides between equal accuracies."""
    return evaluation.accuracy, -evaluation.loss


def _key(members: Sequence[Member], aggregator: str) -> tuple[str, tuple[Path, ...]]:
    paths = tuple(sorted(member.weights_path for member in members))
    return ("" if len(paths) == 1 else aggregator), paths

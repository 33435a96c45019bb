"""The tables of ecavg.sqlite3, and their rows as the store and the rules in upkeep/ give and take them."""

from dataclasses import dataclass

from ecavg.common.run_state import Phase

# Never edit one, add another.
MIGRATIONS = (
    """
    CREATE TABLE run (
        only INTEGER PRIMARY KEY DEFAULT 1 CHECK (only = 1),
        run_id TEXT NOT NULL,
        config_json TEXT NOT NULL,
        created_at REAL NOT NULL
    );
    CREATE TABLE agents (
        agent_id TEXT PRIMARY KEY NOT NULL,
        slot INTEGER NOT NULL UNIQUE,
        joined_at REAL NOT NULL
    );
    CREATE TABLE rounds (
        number INTEGER PRIMARY KEY,
        phase TEXT NOT NULL,
        initial_weights TEXT NOT NULL,
        published TEXT,
        failure TEXT NOT NULL DEFAULT '',
        opened_at REAL NOT NULL
    );
    CREATE TABLE phase_history (
        entry INTEGER PRIMARY KEY,
        round INTEGER NOT NULL REFERENCES rounds (number),
        phase TEXT NOT NULL,
        at REAL NOT NULL
    );
    CREATE INDEX phase_history_by_round ON phase_history (round);
    CREATE TABLE contributions (
        round INTEGER NOT NULL REFERENCES rounds (number),
        agent_id TEXT NOT NULL REFERENCES agents (agent_id),
        outcome TEXT NOT NULL CHECK (outcome IN ('accepted', 'rejected', 'late')),
        weights TEXT NOT NULL,
        shards TEXT NOT NULL,
        num_examples INTEGER NOT NULL,
        accuracy_local REAL,
        reason TEXT NOT NULL,
        message TEXT NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (round, agent_id)
    );
    CREATE TABLE reports (
        round INTEGER NOT NULL REFERENCES rounds (number),
        agent_id TEXT NOT NULL REFERENCES agents (agent_id),
        accuracy_local REAL,
        accuracy_before REAL,
        accuracy_after REAL NOT NULL,
        num_held_out INTEGER NOT NULL,
        applied INTEGER NOT NULL,
        reason TEXT NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (round, agent_id)
    );
    CREATE TABLE uploads (
        agent_id TEXT NOT NULL REFERENCES agents (agent_id),
        digest TEXT NOT NULL,
        kind TEXT NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (agent_id, digest, kind)
    );
    """,
    """
    ALTER TABLE rounds ADD COLUMN retired INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE removals (digest TEXT PRIMARY KEY NOT NULL);
    CREATE INDEX uploads_by_digest ON uploads (digest);
    CREATE VIEW named_blobs AS
        SELECT number AS round, '' AS agent_id, initial_weights AS digest, opened_at AS at FROM rounds
        UNION ALL SELECT number, '', published, opened_at FROM rounds WHERE published IS NOT NULL
        UNION ALL SELECT round, agent_id, weights, at FROM contributions WHERE weights != ''
        UNION ALL SELECT round, agent_id, value, contributions.at FROM contributions, json_each(shards);
    """,
    "ALTER TABLE contributions ADD COLUMN initial_weights TEXT;",
    "ALTER TABLE reports ADD COLUMN accuracy_adapted REAL;",
    """
    CREATE TABLE encodings (weights TEXT PRIMARY KEY NOT NULL, digest TEXT NOT NULL, base TEXT);
    DROP VIEW named_blobs;
    CREATE VIEW named_blobs AS
        WITH ours AS (
            SELECT number AS round, initial_weights AS digest, opened_at AS at FROM rounds
            UNION ALL SELECT number, published, opened_at FROM rounds WHERE published IS NOT NULL
        )
        SELECT round, '' AS agent_id, digest, at FROM ours
        UNION ALL SELECT round, '', encodings.digest, at FROM ours
            JOIN encodings ON encodings.weights = ours.digest
        UNION ALL SELECT round, agent_id, weights, at FROM contributions WHERE weights != ''
        UNION ALL SELECT round, agent_id, value, contributions.at FROM contributions, json_each(shards);
    """,
    """
    ALTER TABLE contributions ADD COLUMN num_shared INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE rounds ADD COLUMN without_data INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE forgettings (
        pseudonym TEXT PRIMARY KEY NOT NULL,
        agent_id TEXT,
        slot INTEGER,
        models TEXT NOT NULL DEFAULT '[]',
        asked_at REAL NOT NULL,
        done_at REAL
    );
    DROP VIEW named_blobs;
    CREATE VIEW named_blobs AS
        WITH ours AS (
            SELECT number AS round, initial_weights AS digest, opened_at AS at FROM rounds
            UNION ALL SELECT number, published, opened_at FROM rounds WHERE published IS NOT NULL
        )
        SELECT round, '' AS agent_id, digest, at FROM ours
        UNION ALL SELECT round, '', encodings.digest, at FROM ours
            JOIN encodings ON encodings.weights = ours.digest
        UNION ALL SELECT round, agent_id, weights, at FROM contributions WHERE weights != ''
        UNION ALL SELECT round, agent_id, value, contributions.at
            FROM contributions JOIN rounds ON number = round, json_each(shards) WHERE NOT without_data;
    """,
    """
    CREATE TABLE forgotten_contributions (
        pseudonym TEXT NOT NULL REFERENCES forgettings (pseudonym),
        round INTEGER NOT NULL REFERENCES rounds (number),
        weights TEXT NOT NULL,
        shards TEXT NOT NULL,
        num_examples INTEGER NOT NULL,
        PRIMARY KEY (pseudonym, round)
    );
    CREATE INDEX forgotten_contributions_by_round ON forgotten_contributions (round);
    INSERT INTO forgotten_contributions
        SELECT pseudonym, json_extract(value, '$[0]'), '', '[]', 0 FROM forgettings, json_each(models);
    ALTER TABLE forgettings DROP COLUMN models;
    """,
    """
    ALTER TABLE run ADD COLUMN probe TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE run ADD COLUMN class_names TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE run ADD COLUMN class_names_of TEXT NOT NULL DEFAULT '';
    """,
    "ALTER TABLE run ADD COLUMN planned_rounds INTEGER NOT NULL DEFAULT 1;",
    """
    CREATE TABLE selections (
        round INTEGER NOT NULL REFERENCES rounds (number),
        agent_id TEXT NOT NULL REFERENCES agents (agent_id),
        selection TEXT NOT NULL CHECK (selection IN ('drawn', 'not_ready')),
        PRIMARY KEY (round, agent_id)
    );
    """,
    "ALTER TABLE rounds ADD COLUMN has_full_curve INTEGER NOT NULL DEFAULT 0;",
    """
    CREATE TABLE traffic (
        round INTEGER PRIMARY KEY REFERENCES rounds (number),
        received_bytes INTEGER NOT NULL,
        sent_bytes INTEGER NOT NULL
    );
    """,
    """
    ALTER TABLE contributions ADD COLUMN staleness INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE rests (weights TEXT PRIMARY KEY NOT NULL, digest TEXT NOT NULL);
    CREATE INDEX rests_by_digest ON rests (digest);
    DROP VIEW named_blobs;
    CREATE VIEW named_blobs AS
        WITH ours AS (
            SELECT number AS round, initial_weights AS digest, opened_at AS at FROM rounds
            UNION ALL SELECT number, published, opened_at FROM rounds WHERE published IS NOT NULL
        )
        SELECT round, '' AS agent_id, digest, at FROM ours
        UNION ALL SELECT round, '', encodings.digest, at FROM ours
            JOIN encodings ON encodings.weights = ours.digest
        UNION ALL SELECT round, '', rests.digest, at FROM ours JOIN rests ON rests.weights = ours.digest
        UNION ALL SELECT round, agent_id, weights, at FROM contributions WHERE weights != ''
        UNION ALL SELECT round, '', initial_weights, at FROM contributions WHERE staleness
        UNION ALL SELECT round, agent_id, value, contributions.at
            FROM contributions JOIN rounds ON number = round, json_each(shards) WHERE NOT without_data;
    """,
    """
    ALTER TABLE contributions RENAME COLUMN accuracy_local TO score_local;
    ALTER TABLE reports RENAME COLUMN accuracy_local TO score_local;
    ALTER TABLE reports RENAME COLUMN accuracy_before TO score_before;
    ALTER TABLE reports RENAME COLUMN accuracy_after TO score_after;
    ALTER TABLE reports RENAME COLUMN accuracy_adapted TO score_adapted;
    """,
    """
    CREATE TABLE rollouts (
        round INTEGER PRIMARY KEY REFERENCES rounds (number),
        state TEXT NOT NULL CHECK (state IN ('canary', 'released', 'withdrawn')),
        reason TEXT NOT NULL DEFAULT '',
        begun_at REAL NOT NULL,
        decided_at REAL
    );
    CREATE TABLE canaries (
        round INTEGER NOT NULL REFERENCES rollouts (round),
        agent_id TEXT NOT NULL REFERENCES agents (agent_id),
        PRIMARY KEY (round, agent_id)
    );
    CREATE TABLE pins (
        only INTEGER PRIMARY KEY DEFAULT 1 CHECK (only = 1),
        round INTEGER NOT NULL REFERENCES rounds (number),
        at REAL NOT NULL
    );
    ALTER TABLE reports ADD COLUMN difference_total REAL;
    ALTER TABLE reports ADD COLUMN difference_squares REAL;
    """,
)


@dataclass(frozen=True)
class RunRow:
    """The run of a state directory. Times, here and below, are in seconds since the epoch."""

    run_id: str
    config_json: str
    created_at: float
    # Outputs of the model, by which agents know that they have the same one: see common/rehearsal.py.
    probe: tuple[float, ...] = ()
    # The names that agents have given the classes, label 0 first; empty: none has.
    class_names: tuple[str, ...] = ()
    # The agent that has given them.
    class_names_of: str = ""
    # How many rounds the learning-rate schedule is for; see common/schedule.py.
    planned_rounds: int = 1


@dataclass(frozen=True)
class AgentRow:
    """An agent that has joined the run."""

    agent_id: str
    # From 1 on, in the order of joining.
    slot: int
    joined_at: float


@dataclass(frozen=True)
class RoundRow:
    """A round, and how far it has come."""

    number: int
    phase: str
    # The digest of the weights that the agents' pre-training starts from.
    initial_digest: str
    # The digest of the global model, once there is one.
    published_digest: str | None
    failure: str
    opened_at: float
    # When each phase was entered first.
    phase_times: dict[str, float]
    # Whether the round's blobs have been given up; see cloud_server/upkeep/retention.py.
    retired: bool = False
    # True if the shards of the round have been given up.
    without_data: bool = False
    # True if the learning rate takes a full curve in this round after the plan: see common/schedule.py.
    has_full_curve: bool = False

    @property
    def phases(self) -> list[tuple[str, float]]:
        """Return the phases that the round has entered, in order, and when it did."""
        entered = {Phase.COLLECTING.value: self.opened_at} | self.phase_times
        return sorted(entered.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class SelectionRow:
    """Who was drawn for a round, and who was passed over, as it is on record."""

    # The ids of the agents that were drawn; empty: no sample was drawn.
    drawn: frozenset[str] = frozenset()
    # The ids of the agents that were connected, and not ready.
    not_ready: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EncodingRow:
    """What weights of the server also travel as, in fewer bytes; see common/wire.py."""

    # The digest of the encoded blob.
    digest: str
    # The digest of the weights that the encoded ones are the difference from; None: they are no difference.
    base: str | None


@dataclass(frozen=True)
class ReportRow:
    """What became of a published model on one device."""

    agent_id: str
    score_local: float | None
    score_before: float | None
    score_after: float
    num_held_out: int
    applied: bool
    # Why the model was not applied; empty where it was.
    reason: str
    at: float
    # None: the model was not adapted, or that is not known.
    score_adapted: float | None = None
    # The sum of the differences of the scores of the held-out examples, as in common/comparison.py, and
    # of their squares; None: there was no model to compare with.
    difference_total: float | None = None
    difference_squares: float | None = None


@dataclass(frozen=True)
class RolloutRow:
    """How far the roll-out of a round's model is; a published round without a row is for all agents."""

    round: int
    # "canary", "released" or "withdrawn".
    state: str
    # Why the model was released or withdrawn, in one line; empty: that is not decided.
    reason: str
    begun_at: float
    # None: it is not decided.
    decided_at: float | None
    # The ids of the agents that have the model before all others; empty: there were none.
    canary: tuple[str, ...] = ()


@dataclass(frozen=True)
class UploadRow:
    """A blob that an agent has uploaded, whole and checked."""

    agent_id: str
    digest: str
    # "weights" or "data".
    kind: str
    at: float


@dataclass(frozen=True)
class ForgettingRow:
    """That an agent is to be forgotten, or has been; see cloud_server/upkeep/forgetting.py."""

    pseudonym: str
    # The id and the slot are None once the agent has been forgotten.
    agent_id: str | None
    slot: int | None
    asked_at: float
    done_at: float | None
    # Whether the other records still know the agent.
    has_records: bool
    # Round and digest of each published model that had used the agent's data.
    models: tuple[tuple[int, str], ...]

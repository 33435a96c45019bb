"""Seeds that streams with names have."""

from ecavg.common.seeds import derive_seed


def test_derived_seeds_are_stable_and_tell_all_parts_apart() -> None:
    assert derive_seed(1, "round", 2) == derive_seed(1, "round", 2)
    # python3 -c 'import hashlib; print(int(hashlib.sha256(b"[0, \"a\", 1]").hexdigest()[:16], 16) >> 1)'
    assert derive_seed(0, "a", 1) == 5352727647617221297
    parts = [(), (1,), ("1",), ("a", "b"), ("ab",), ("b", "a"), ("a", 1), ("a", 11), ("a", 1, 1)]
    seeds = {derive_seed(seed, *part) for seed in (0, 1, 2**63 - 1) for part in parts}
    assert len(seeds) == 3 * len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)

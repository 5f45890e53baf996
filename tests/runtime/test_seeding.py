"""Every draw is named by its arguments, and the same on every machine and in every version."""

import itertools

import torch

from runtime.seeding import generator, key, torch_generator


def test_draws_are_the_same_for_ever():
    """Values written down on the first day: runs made with them must stay reproducible."""
    assert key(0, "crops", 1, 2) == 0x7E8E7A79E4A03C05091BA8AA7263E9A1
    assert generator(0, "crops", 1, 2).integers(10**6, size=3).tolist() == [188303, 311407, 412370]
    assert torch.randint(10**6, (3,), generator=torch_generator(0, "crops", 1, 2)).tolist() == [768267, 39410, 980933]


def test_every_argument_changes_the_key():
    keys = {
        key(seed, purpose, *counters)
        for seed, purpose, counters in itertools.product(
            (0, 1), ("crops", "masks"), ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (10,), ("a",))
        )
    }
    assert len(keys) == 32
    assert key(1, "x", 12) != key(1, "x", 1, 2)
    assert max(keys) < 2**128


def test_generators_of_one_name_draw_alike_and_of_others_do_not():
    one, same, other = generator(5, "a", 3), generator(5, "a", 3), generator(5, "a", 4)
    first = one.random(1000)
    assert (first == same.random(1000)).all()
    assert not (first == other.random(1000)).any()
    assert abs(first.mean() - 0.5) < 0.05
    a, b = torch_generator(5, "a", 3), torch_generator(5, "a", 4)
    assert not torch.equal(torch.rand(10, generator=a), torch.rand(10, generator=b))

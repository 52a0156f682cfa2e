"""Learning-rate schedules against the original's values and closed forms."""

import pytest

from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2


def linear(length=10**13, low=1.0):
    return LambdaLinearScheduler(
        warm_up_steps=[10000], f_min=[low], f_max=[1.0], f_start=[1e-6], cycle_lengths=[length]
    )


def test_release_warm_up():
    expected = {0: 1e-6, 1: 1.009999e-4, 100: 1.000099e-2, 9999: 0.9999000001, 10000: 1, 20000: 1}
    for step, factor in expected.items():
        assert linear().schedule(step) == pytest.approx(factor, rel=1e-9)


def test_linear_decay_and_end():
    schedule = linear(length=40000, low=0.0)
    assert schedule(10000) == pytest.approx(0.75)  # measured from the cycle's start, as in LDM
    assert schedule(40000) == schedule(50000) == 0


def test_cosine():
    schedule = LambdaWarmUpCosineScheduler(100, lr_min=0.1, lr_max=1.0, lr_start=0.0, max_decay_steps=1100)
    assert schedule(50) == pytest.approx(0.5)
    assert schedule(100) == pytest.approx(1.0)
    assert schedule(600) == pytest.approx(0.55)
    assert schedule(1100) == schedule(5000) == pytest.approx(0.1)


def test_cycles_follow_one_another():
    schedule = LambdaWarmUpCosineScheduler2([10, 10], [0.0, 0.0], [1.0, 0.5], [0.0, 0.0], [100, 200])
    assert schedule(10) == pytest.approx(1.0)
    assert schedule(100) == pytest.approx(0.0)
    assert schedule(110) == pytest.approx(0.5)


def test_lists_must_agree():
    with pytest.raises(ValueError, match="same length"):
        LambdaLinearScheduler([1], [0.0], [1.0], [0.0, 0.0], [10])


@pytest.mark.parametrize("cls", [LambdaLinearScheduler, LambdaWarmUpCosineScheduler2])
def test_a_cycle_as_long_as_the_run(cls):
    settings = {"warm_up_steps": [10], "f_min": [0.1], "f_max": [1.0], "f_start": [0.0]}
    open_end, fixed = cls(**settings, cycle_lengths=None), cls(**settings, cycle_lengths=[300])
    assert [open_end(step) for step in (5, 10, 10**6)] == [0.5, 1.0, 1.0], "a run of unknown length"
    open_end.run_length = 300
    assert [open_end(step) for step in range(400)] == [fixed(step) for step in range(400)]
    assert fixed(300) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="same length"):
        cls([1, 1], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], None)


def test_a_cycle_has_a_length():
    with pytest.raises(ValueError, match="at least 1"):
        LambdaLinearScheduler([1], [0.0], [1.0], [0.0], [-1])


def test_a_warm_up_as_long_as_the_cycle():
    schedule = LambdaWarmUpCosineScheduler2([100], [0.0], [1.0], [0.0], [100])
    assert schedule(50) == 0.5 and schedule(100) == schedule(200) == 1.0

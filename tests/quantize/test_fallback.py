"""The search for layers that return to float: few, and cheap ones."""

from __future__ import annotations

from edgestill.pipeline.quantize.fallback import Layer, Trial, search


def layers(*harms: float, macs: tuple[int, ...] | None = None) -> list[Layer]:
    costs = macs or (1,) * len(harms)
    return [
        Layer(f"l{i}", harm, cost) for i, (harm, cost) in enumerate(zip(harms, costs, strict=True))
    ]


class Measured:
    """Holds when all of `needed` are in float; keeps what was asked."""

    def __init__(self, *needed: str) -> None:
        self.needed = frozenset(needed)
        self.asked: list[frozenset[str]] = []

    def __call__(self, kept: frozenset[str]) -> Trial:
        self.asked.append(kept)
        missing = len(self.needed - kept)
        return Trial(tuple(sorted(kept)), drop_points=float(missing), holds=missing == 0)


def test_the_most_harmful_layer_returns_first_and_alone_if_that_is_enough() -> None:
    attempt = Measured("l1")

    chosen, trials = search(layers(0.1, 0.9, 0.2, 0.3), attempt)

    assert chosen.kept_float == ("l1",)
    assert attempt.asked == [frozenset({"l1"})]
    assert len(trials) == 1


def test_layers_that_returned_in_vain_become_int8_again_the_costliest_first() -> None:
    attempt = Measured("l3")
    ranked = layers(0.9, 0.8, 0.7, 0.6, 0.1, macs=(10, 1000, 1, 1, 1))

    chosen, _ = search(ranked, attempt)

    assert chosen.kept_float == ("l3",)
    grown = [kept for kept in attempt.asked if len(kept) in (1, 3, 4)][:3]
    assert grown[0] == {"l0"}
    assert grown[1] == {"l0", "l1", "l2"}
    # of the four that hold together, l1 costs most and tries first
    assert attempt.asked[3] == {"l0", "l2", "l3"}


def test_if_nothing_holds_the_least_drop_is_left() -> None:
    attempt = Measured("l0", "l1", "l9")

    chosen, trials = search(layers(0.9, 0.8, 0.7, 0.6), attempt)

    assert not chosen.holds
    assert chosen.drop_points == min(trial.drop_points for trial in trials)


def test_all_layers_never_return_together_for_that_is_no_int8_file() -> None:
    attempt = Measured("none can")

    search(layers(0.4, 0.3, 0.2, 0.1), attempt)

    assert max(len(kept) for kept in attempt.asked) == 3

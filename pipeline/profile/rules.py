"""What to change so that a model gets faster: one rule a cause, in a literal table. Pure.

A rule looks at where the time goes and answers with what it found, or None. Its gain is at most
what it says: the share of the time that would go if the change cost nothing, all else as it is.
Two rules may speak of the same node, so gains do not add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..spec import Spec
from .operators import Operator, Operators
from .roofline import Roofline

LEAST_SHARE = 0.02  # of the time; below it nothing is worth a change
SLOWER = 1.02  # more threads must cost more than noise does
TINY_US = 10.0  # below it, starting a node takes a good part of its time
TINY_NODES, TINY_SHARE = 10, 0.3
TABLE_SHARE = 0.3  # of the weights
BLOCK = 8  # channels that one vector register takes on ARM (NEON, 8 × 16 bits), and AVX2's floats
# Activation functions without an int8 kernel of their own in a chain of int8 nodes.
ACTIVATIONS = frozenset(
    {"HardSwish", "HardSigmoid", "Sigmoid", "QuickGelu", "Gelu", "FastGelu", "BiasGelu", "Erf",
     "Elu", "Celu", "Selu", "PRelu", "LeakyRelu", "Mish", "Softplus", "Softsign", "Tanh", "Relu",
     "Clip", "ThresholdedRelu"}
)  # fmt: skip
NORMS = frozenset(
    {"LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization",
     "GroupNormalization", "InstanceNormalization", "RMSNormalization", "BatchNormalization"}
)  # fmt: skip
MOVES = frozenset({"Transpose", "ReorderInput", "ReorderOutput"})
# Compute nothing: what they cost is their conversions, or counted by the rule about reordering.
SHUFFLES = MOVES | {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast", "Shape"}


class Advice(Spec):
    """share: of the time, that of the nodes it speaks of. gain: of the time, at most."""

    rule: str
    share: float
    gain: float
    text: str


@dataclass(frozen=True)
class Facts:
    """by_threads: thread count → p50 in ms, as far as measured. threads: those of this profile."""

    operators: Operators
    roofline: Roofline
    threads: int = 1
    by_threads: Mapping[int, float] = field(default_factory=dict)

    def share(self, nodes: Iterable[Operator]) -> float:
        return sum(node.us for node in nodes) / self.operators.us if self.operators.us else 0.0

    def bound_us(self, node: Operator) -> float:
        return 1e6 * self.roofline.seconds(
            multiply_adds=node.multiply_adds,
            int8=node.kind == "int8",
            weight_bytes=node.weight_bytes,
            all_weights=self.operators.weight_bytes,
            moved=node.moved_bytes,
        )

    @property
    def products(self) -> list[Operator]:
        return [node for node in self.operators.nodes if node.is_product]


def advise(facts: Facts, *, most: int = 3) -> tuple[Advice, ...]:
    """What is worth most, first; at most so many."""
    found = [one for rule in RULES.values() if (one := rule(facts)) and one.gain >= LEAST_SHARE]
    return tuple(sorted(found, key=lambda one: -one.gain)[:most])


def nothing_quantized(facts: Facts) -> Advice | None:
    """Every product is in float, and int8 kernels are faster here."""
    nodes = facts.products
    if not nodes or any(node.kind == "int8" for node in nodes):
        return None
    return _as_int8("float", facts, nodes, f"all {len(nodes)} products run in float; {{}} in int8")


def float_products(facts: Facts) -> Advice | None:
    """Some products stay float in a file that is quantized."""
    nodes = [node for node in facts.products if node.kind == "float"]
    if not nodes or len(nodes) == len(facts.products):
        return None
    worst = max(nodes, key=lambda node: node.us)
    text = (
        f"{len(nodes)} of {len(facts.products)} products stay float, most of the time in "
        f"{worst.name}: {worst.reason or 'kept float'}; {{}} in int8"
    )
    return _as_int8("float-products", facts, nodes, text)


def float_activations(facts: Facts) -> Advice | None:
    """Activation functions that no int8 kernel takes in."""
    nodes = [node for node in _islands(facts) if _what(node) in ACTIVATIONS]
    around = _around(facts, nodes)
    if not nodes:
        return None
    share = facts.share([*nodes, *around])
    text = (
        f"{_kinds(nodes)} stays float between int8 nodes, {_conversions(around)}; ReLU, trained so "
        "from the start or recovered by distillation, would fuse into the node before it"
    )
    return Advice(rule="float-activations", share=share, gain=share, text=text)


def float_islands(facts: Facts) -> Advice | None:
    """Other operators without an int8 kernel, and the conversions that they cost."""
    nodes = [node for node in _islands(facts) if _what(node) not in ACTIVATIONS]
    around = _around(facts, nodes)
    if not nodes:
        return None
    norms = [node for node in nodes if _what(node) in NORMS]
    removable = [*norms, *around]
    advice = (
        "BatchNorm folds into the layer before it" if norms else "leave its neighbours float too"
    )
    text = f"{_kinds(nodes)} stays float between int8 nodes, {_conversions(around)}; {advice}"
    share = facts.share([*nodes, *around])
    return Advice(rule="float-islands", share=share, gain=facts.share(removable), text=text)


def conversions(facts: Facts) -> Advice | None:
    """Q and DQ that run as nodes, neither at the graph's edges nor around an island."""
    islands = {node.name for node in _islands(facts)}
    nodes = [
        node
        for node in facts.operators.nodes
        if node.kind == "conversion" and node.beside is not None and node.beside not in islands
    ]
    if not nodes:
        return None
    share = facts.share(nodes)
    kinds = ", ".join(f"{n} {kernel}" for kernel, n in Counter(n.kernel for n in nodes).items())
    text = (
        f"{kinds} run as nodes of their own, beside float ones; quantize what is between too, or "
        "leave neighbours float together"
    )
    return Advice(rule="conversions", share=share, gain=share, text=text)


def depthwise(facts: Facts) -> Advice | None:
    """Convolutions with one input channel a group do little for what they read."""
    nodes = [node for node in facts.products if _is_depthwise(node)]
    if not nodes:
        return None
    dense = [node for node in facts.products if not _is_depthwise(node) and node.multiply_adds]
    us = sum(node.us for node in dense)
    rate = sum(node.multiply_adds for node in dense) / us if us else 0.0
    ideal = sum(node.multiply_adds / rate if rate else facts.bound_us(node) for node in nodes)
    share, work = facts.share(nodes), sum(node.multiply_adds for node in nodes)
    part = work / (sum(node.multiply_adds for node in facts.products) or 1)
    text = (
        f"{len(nodes)} depthwise convolutions are {part:.0%} of the multiply-adds and {share:.0%} "
        "of the time; fewer of them, or dense ones in the early, narrow layers (as in "
        "EfficientNetV2's fused blocks)"
    )
    gain = max(0.0, share - ideal / facts.operators.us)
    return Advice(rule="depthwise", share=share, gain=gain, text=text)


def tiny_nodes(facts: Facts) -> Advice | None:
    """Many nodes so short that starting them counts."""
    nodes = [node for node in facts.operators.nodes if node.us < TINY_US]
    share = facts.share(nodes)
    if len(nodes) < TINY_NODES or share < TINY_SHARE:
        return None
    bound = sum(min(node.us, facts.bound_us(node)) for node in nodes) / facts.operators.us
    text = (
        f"{len(nodes)} nodes take less than {TINY_US:g} µs each, most of it to start them; fewer "
        "and wider layers, a larger batch, or one thread"
    )
    return Advice(rule="tiny-nodes", share=share, gain=max(0.0, share - bound), text=text)


def moves(facts: Facts) -> Advice | None:
    """Values that are only put into another order: by the file, or between two layouts."""
    moving = [node for node in facts.operators.nodes if _plain(node.kernel) in MOVES]
    own = [node for node in moving if node.op == "Transpose"]
    # into the kernels' layout and out of it again costs one each at least
    between = [node for node in moving if node.op != "Transpose"][1:-1]
    if not own and not between:
        return None
    share = facts.share([*own, *between])
    causes = []
    if own:
        causes.append(
            f"{len(own)} Transpose in the file: write the network so that no axis changes its place"
        )
    if between:
        causes.append(
            f"{len(between)} changes of layout between kernels: let no operator between "
            "convolutions lack a kernel for their layout"
        )
    text = "values are only reordered by " + ", and by ".join(causes)
    return Advice(rule="reordering", share=share, gain=share, text=text)


def odd_channels(facts: Facts) -> Advice | None:
    """Output channels that do not fill a vector; but the classes, which nobody chooses."""
    nodes = [
        node
        for node in facts.products
        if node.weight_shape and not node.is_last and _channels(node) % BLOCK
    ]
    if not nodes:
        return None
    idle = sum(node.us * (1 - _channels(node) / _filled(_channels(node))) for node in nodes)
    sizes = ", ".join(map(str, sorted({_channels(node) for node in nodes})[:5]))
    text = (
        f"{len(nodes)} layers have {sizes} output channels, no multiple of {BLOCK}: kernels "
        f"compute the missing ones too; a multiple of {BLOCK}, better {2 * BLOCK}, costs the same"
    )
    return Advice(
        rule="odd-channels", share=facts.share(nodes), gain=idle / facts.operators.us, text=text
    )


def too_many_threads(facts: Facts) -> Advice | None:
    """Fewer threads were faster."""
    own = facts.by_threads.get(facts.threads)
    fewer = {n: p50 for n, p50 in facts.by_threads.items() if n < facts.threads}
    if own is None or not fewer:
        return None
    best = min(fewer, key=lambda n: fewer[n])
    if own < SLOWER * fewer[best]:
        return None
    text = (
        f"{facts.threads} threads take {own:.3g} ms, {best} {fewer[best]:.3g} ms: too little work "
        f"to divide, or too few free CPUs; set intra_op_num_threads to {best}"
    )
    return Advice(rule="threads", share=1.0, gain=1 - fewer[best] / own, text=text)


def embeddings(facts: Facts) -> Advice | None:
    """Tables of rows that are looked up: bytes more than time."""
    nodes = [node for node in facts.operators.nodes if node.table_bytes]
    if not nodes:
        return None
    table = sum(node.table_bytes for node in nodes)
    part = table / (table + facts.operators.weight_bytes)
    share = facts.share(nodes)
    if share < LEAST_SHARE and part < TABLE_SHARE:
        return None
    text = (
        f"embeddings are {part:.0%} of the stored weights ({table / 1e6:.3g} MB); "
        "`data.tokenize.trim` and `embedding_size` make them smaller, which loads faster too"
    )
    return Advice(rule="embeddings", share=share, gain=share, text=text)


# Rule name → rule; where two gain the same, the first stands first.
RULES: dict[str, Callable[[Facts], Advice | None]] = {
    "float": nothing_quantized,
    "float-products": float_products,
    "float-activations": float_activations,
    "float-islands": float_islands,
    "conversions": conversions,
    "depthwise": depthwise,
    "tiny-nodes": tiny_nodes,
    "reordering": moves,
    "odd-channels": odd_channels,
    "threads": too_many_threads,
    "embeddings": embeddings,
}


def _as_int8(rule: str, facts: Facts, nodes: Sequence[Operator], text: str) -> Advice | None:
    """The gain where these products ran at int8's peak instead of float's; None: int8 is slower."""
    faster = facts.roofline.peak(int8=True) / facts.roofline.peak(int8=False)
    if faster <= 1:
        return None
    share = facts.share(nodes)
    words = f"this machine multiplies {faster:.1f} × as fast"
    return Advice(rule=rule, share=share, gain=share * (1 - 1 / faster), text=text.format(words))


def _islands(facts: Facts) -> list[Operator]:
    return [n for n in facts.operators.nodes if n.island and _what(n) not in SHUFFLES]


def _around(facts: Facts, nodes: Sequence[Operator]) -> list[Operator]:
    """Conversions beside these nodes."""
    names = {node.name for node in nodes}
    return [node for node in facts.operators.nodes if node.beside in names]


def _conversions(around: Sequence[Operator]) -> str:
    return f"with {len(around)} conversions around it" if around else "with no conversion"


def _kinds(nodes: Sequence[Operator]) -> str:
    """`HardSwish (14), Mul (2)`; nodes that were one in the file count once."""
    counts = Counter({node.name: _what(node) for node in nodes}.values())
    return ", ".join(f"{op} ({count})" for op, count in counts.most_common(4))


def _is_depthwise(node: Operator) -> bool:
    return node.groups > 1 and len(node.weight_shape) > 2 and node.weight_shape[1] == 1


def _channels(node: Operator) -> int:
    """Of the output: the first axis of a convolution's weight (O, I, …), the last of (I, O)."""
    return node.weight_shape[0 if len(node.weight_shape) > 2 else -1]


def _filled(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


def _what(node: Operator) -> str:
    """The file's operator; where several of it became one, e.g. Gelu, the name of that."""
    kernel = _plain(node.kernel)
    return kernel if kernel in ACTIVATIONS | NORMS else node.op


def _plain(kernel: str) -> str:
    return kernel.removeprefix("nchwc.")

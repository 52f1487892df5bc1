"""Networks and where they come from.

    zoo.py        the table of our own nets, and how their arguments are checked
    cifar_resnet.py, resnet.py, mobilenet.py, plain.py   the nets; layers.py: what they share
    source.py     a reference (zoo name, FILE.py:factory, …) → a network that ran once
    user_code.py  a user's own module, isolated from everybody else's modules of the same name
    program.py    a .pt2 file, read without running code hidden in it
    hf_folder.py  what a Hugging Face folder says of itself; hf.py: its network and weights
    hf_text.py    text encoders: what they are fed, which of their layers stay
    weights.py    checkpoints: read, check, load
    plan.py       what pruning left of a network, as sizes: enough to build it again
    store.py      a network on disk: weights, reference and all a user of it has to know
    paths.py      names that a user writes as patterns

Importing this package imports nothing.
"""

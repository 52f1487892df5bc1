"""Images: read, split, brought to one size, and augmented so that it can be replayed.

`stage.prepare_data` reads the sets of a recipe once and stores them as uint8 arrays;
`dataset.open_data` opens them again, resident or memory-mapped; `preprocess.to_input` turns them
into what a network sees, and `augment.Views` into what it is trained on.
"""

"""Views of a set to train on: augmented images, or texts of which pieces are hidden or left out."""

from __future__ import annotations

from torch import Tensor

from ..recipe import PreprocessSpec
from ..stage import Context
from ..training_spec import AugmentSpec
from .augment import Views
from .dataset import SampleSet
from .inputs import Preparation
from .text_views import TextViews

AnyViews = Views | TextViews


def open_views(
    samples: SampleSet, how: Preparation, augment: AugmentSpec, *, context: Context
) -> AnyViews:
    """Replayable views; a teacher's labels and the student see the same."""
    if isinstance(how, PreprocessSpec):
        return Views(samples, how, augment, context.seed, context.device)
    return TextViews(samples, how, augment, context.seed, context.device)


def lengths_of(views: AnyViews, rows: Tensor | None = None) -> Tensor | None:
    """Tokens of each text (N,), or of those in `rows`; None: images, which are all of one size."""
    if isinstance(views, Views):
        return None
    return views.lengths if rows is None else views.lengths[rows]

"""A layer compressed as a whole by training it from where it is dense, beside the dense model.

x        the dense layer on x, which leaves the next x
x^       the Gram of what each linear reads, where the method begins with a closed form
x^, next x, x    all epochs: towards the next x, and towards what the dense layer's linears give on x
x, gradient      in the same steps, where importance goes by the dense model's language-model loss
"""

from __future__ import annotations

import collections
import functools

import torch

from streamlap.errors import NumericalError, located
from streamlap.families.layer import StreamLayer
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import Moments
from streamlap.linalg.rows import any_out, struck
from streamlap.linalg.solution import joined
from streamlap.methods.trained.base import Distilled
from streamlap.methods.trained.steps import HeldLoss
from streamlap.pipeline.layer_in_hand import LayerEdits, LayerInHand, refuse_overflow
from streamlap.pipeline.session import Session
from streamlap.pipeline.train import Lessons, run_epochs


def distil_layer(hand: LayerInHand, method: Distilled, session: Session) -> LayerEdits:
    """The edits of the layer, applied, and how the training went. Raises Interrupted after an epoch where a stop is due."""
    layer, lessons = hand.layer, Lessons.of(hand)
    with hand.clock.phase("dense"):
        out_NL = hand.runner.carry(layer, hand.index, hand.dense, hand.next_dense)
    with hand.clock.phase("solve"), hand.runner.claim("solve"):
        gram = functools.partial(input_gram, hand)
        training = method.start(layer, hand.index, hand.plan.layout, gram, len(lessons.train))
    take = functools.partial(lessons.lessons, reads_dense=method.reads_dense, reads_gradient=method.reads_gradient)
    with hand.clock.phase("refine"), hand.runner.claim("refine"):
        with located(layer.prefix):
            run_epochs(training, lessons, take, method.epochs, session)
            edits = training.finish()
        refuse_overflow(layer, edits)
        layer.apply(edits)
        with located(layer.prefix):
            end = stored_loss(layer, lessons)
    trace = {"start": training.held[0], "end": end, "epochs": training.epoch}
    notes = joined(*(edit.notes for edit in edits))
    return LayerEdits(edits=edits, out_NL=out_NL, notes=notes, trace=trace)


def stored_loss(layer: StreamLayer, lessons: Lessons) -> float:
    """Loss on held-out tokens of the layer as it is written, without those that overflow in it."""
    found = HeldLoss()
    for x_BLD, target_BLD in lessons.pairs(lessons.held):
        y_BLD = layer(x_BLD)
        found.update(x_BLD, struck(target_BLD, any_out(y_BLD)), y_BLD)
    if not found.tokens:
        raise NumericalError(
            "as it is written, no token of the windows that are held out has finite numbers behind it; wanted some. Take dtype "
            "float32 or bfloat16."
        )
    return found.value


def input_gram(hand: LayerInHand, role: str) -> Gram:
    """Of what the dense layer's linear of a role reads on the compressed stream, over the sequences to train on."""
    layer, runner = hand.layer, hand.runner
    numbers = Lessons.of(hand).train

    def attempt() -> Moments:
        for careful in (False, True):
            moments = Moments()
            with layer.observed([(role, moments)], careful):
                batches = runner.together([hand.compressed], "capture", numbers)
                collections.deque(
                    (layer(part) for (x_BLD,) in batches for part in torch.split(x_BLD, runner.ladder.micro)), maxlen=0
                )
            if moments.finite:
                return moments
        raise NumericalError(f"{layer.prefix}: products of activations overflow; wanted finite ones. Scale the model.")

    with hand.clock.phase("capture"):
        return runner.ladder.climb("capture", hand.index, attempt).finish()[0]

"""Data: what is valid, what is not, and what stands in for what is missing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtdiffusion_registry.testing.contract import (
    BATCHES,
    NotApplicable,
    check,
    close,
    contract_error,
    finite,
    kind_of,
    require,
    same_dtype,
    same_shape,
)
from mtdiffusion_registry.testing.modality.subject import DTYPE, ModalitySubject, accepts

__tracebackhide__ = True


@check("entry_point")
def build(subject: ModalitySubject) -> None:
    """build gives a Modality of an Encoder and a Decoder, for every latent that it accepts."""
    require(bool(subject.cases), "a modality can be built", "none was", "accept the first latent")


@check("build")
def derive(subject: ModalitySubject) -> None:
    """derive(source) is a batch of x, each of its own sample alone."""
    modality, source = subject.cases[0].modality, subject.source
    if not modality.derived:
        raise NotApplicable("x is not derived: derived is False")
    if source is None:
        raise NotApplicable("no source is given to derive x from; give the data set's field, source=[n, ...]")
    with torch.no_grad():
        x = modality.derive(source)
        require(
            isinstance(x, Tensor) and x.shape[:1] == (len(source),),
            "derive(source) has a row for each sample",
            f"shape {tuple(x.shape)}, {len(source)} samples" if isinstance(x, Tensor) else kind_of(x),
            "derive gets a batch of the field, and returns a batch of x",
        )
        fix = "use no statistics of the batch: data are derived some hundred samples at a time"
        close(modality.derive(source[:1]), x[:1], "what is derived does not depend on the other samples", fix)


@check("derive")
def examples(subject: ModalitySubject) -> None:
    """check accepts real data, or what a fresh head makes."""
    if subject.source is not None:
        what, fix = "what derive makes of the source", "return a valid x from derive: right shape and dtype, finite"
    elif subject.given is None:
        what = "mode(params), or sample(params) where modes are alike, since no examples are given"
        fix = "return a valid x: right dtype, within range"
    else:
        what, fix = "the examples", "make check accept real data, or give valid examples"
    for case in subject.cases:
        accepts(case.modality, subject.examples, what, fix)


@check("examples")
def refusal(subject: ModalitySubject) -> None:
    """check refuses an axis too many and NaN by a ValueError."""
    x = subject.examples
    wrong = {"an axis too many": x.unsqueeze(-1)}
    if x.is_floating_point():
        spoilt = x.clone()
        spoilt.view(-1)[0] = math.nan
        wrong["a NaN"] = spoilt
    modality = subject.cases[0].modality
    for what, bad in wrong.items():
        refused = False
        try:
            modality.check(bad)
        except ValueError:
            refused = True
        except Exception as error:
            raise contract_error(
                f"check refuses x with {what} by a ValueError", f"{type(error).__name__}: {error}", "raise a ValueError"
            ) from error
        require(refused, f"check refuses x with {what}", "it passed", "compare shape, dtype and range in check")


@check("examples")
def placeholder(subject: ModalitySubject) -> None:
    """placeholder(B) is a valid batch x, with a finite code."""
    shape = subject.examples.shape[1:]
    for case in subject.cases:
        for batch in BATCHES:
            blank = case.modality.placeholder(batch)
            same_shape(blank, (batch, *shape), "placeholder(B) has the shape of a batch x", "placeholder")
            same_dtype(blank, subject.examples.dtype, "placeholder(B) has the dtype of x", DTYPE)
            accepts(case.modality, blank, "placeholder(B)", "return a valid x")
            code = case.modality.encoder(blank)
            finite(code, "the code of a placeholder is finite", "it is encoded, then weighted with 0")


@check("placeholder")
def stored(subject: ModalitySubject) -> None:
    """from_stored makes x of each of stored_dtypes, of zeros too, and check_stored lets them pass."""
    modality, blank = subject.cases[0].modality, subject.cases[0].modality.placeholder(BATCHES[0])
    if not modality.stored_dtypes:
        raise NotApplicable("data sets give x itself: stored_dtypes is ()")
    for dtype in modality.stored_dtypes:
        require(dtype != blank.dtype, "stored_dtypes are none of x's own", f"{dtype}", "leave it out")
        zeros = torch.zeros(blank.shape, dtype=dtype)
        x = modality.from_stored(zeros)
        what = f"from_stored of zeros of {dtype}"
        same_shape(x, blank.shape, f"{what} has the shape of x", "from_stored")
        same_dtype(x, blank.dtype, f"{what} has the dtype of x", DTYPE)
        accepts(modality, x, what, "let zeros stand for a valid x: they are of samples that lack it")
        try:
            modality.check_stored(zeros)
        except ValueError as error:
            raise contract_error(f"check_stored accepts what check does, {what}", str(error), "mend it") from error

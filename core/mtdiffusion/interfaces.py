"""What the core asks of the parts it is wired from: encoders, decoders, modalities, backbones and weight schedules.

Shape legend, used throughout the core::

    B  batch                 C, H, W  channels, height, width of the shared diffusion space
    N  modality instances    F, G     channels of the backbone's feature map, width of its feature vector
    T  diffusion steps       c        channels of one modality's own share of the diffusion space

Time: ``t = 0`` is data and ``t = T`` is noise, everywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor, nn

from mtdiffusion.retention import Retention

Params = Mapping[str, Tensor]
"""Parameters of p(x_i | .), each tensor with the batch first. Classifier-free guidance extrapolates them linearly, so
they must be unconstrained (a mean, logits, a log scale): never a probability or a variance."""


@frozen
class LatentSpec:
    """A diffusion space, or one modality's share of it: tensors of shape ``[B, channels, height, width]``."""

    channels: int = field(validator=ge(1))
    height: int = field(validator=ge(1))
    width: int = field(validator=ge(1))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.height, self.width)

    @property
    def numel(self) -> int:
        return self.channels * self.height * self.width


@frozen
class FeatureSpec:
    """The shapes of what a backbone returns: a map ``[B, channels, height, width]`` and a vector ``[B, vector]``."""

    channels: int
    height: int
    width: int
    vector: int


class Features(NamedTuple):
    """The shared features h that every decoder head reads.

    A named tuple: ``torch.compile`` cannot trace the making of a frozen attrs class.

    Attributes:
        map: ``[B, F, H, W]``, aligned with the diffusion space; spatial heads read it.
        vector: ``[B, G]``, a summary that keeps where things are (not a mean over places); vector heads read it.
    """

    map: Tensor
    vector: Tensor


@frozen
class InputSpec:
    """How a person may give one x on a page or in a form. What is entered goes through :meth:`Modality.parse`.

    Attributes:
        form: "file": a file, or a line of text. What :meth:`Modality.write` writes says more: where that is a ``.wav``
            a sound may be recorded, and where it is a ``.txt`` a text may be typed. "picture": a file, or a drawing,
            handed over as a PNG in RGB of the size of :meth:`Modality.render`'s pictures. "classes": a file, or a
            painting, handed over as a PNG of class indices of that size. "choice": one of ``names``.
        names: of a "choice", what there is to choose from, each as parse takes it; of "classes", theirs, from index 0.
        colours: of "classes", RGB in 0..255 of each, all different.
    """

    form: Literal["file", "picture", "classes", "choice"] = "file"
    names: Sequence[str] = ()
    colours: Sequence[tuple[int, int, int]] = ()


class Encoder(nn.Module, ABC):
    """E_i: maps a modality to its code e_i in its share of the diffusion space.

    Codes should have a root mean square of about 1 and must not shrink under training (L1 rewards it): a fixed or a
    normalised encoder is safe.

    Attributes:
        latent: the share of the diffusion space that the code fills.
        spatial: whether place (h, w) of the code shows place (h, w) of x, so that x may be observed in part.
        readout_dim: width of :meth:`readout`; 0 if there is none.
    """

    spatial: bool = False
    readout_dim: int = 0

    def __init__(self, latent: LatentSpec) -> None:
        super().__init__()
        self.latent = latent

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Encode x ``[B, ...]`` to e ``[B, c, H, W]``."""

    def observe(self, x: Tensor, visible: Tensor) -> Tensor:
        """Encode what can be seen of x: ``[B, c, H, W]``, zero where ``visible [B, 1, H, W]`` (0 or 1) is 0.

        Override it when a place of the code depends on more of x than its own patch: nothing of what is hidden may
        pass.
        """
        return self(x) * visible

    def known(self, x: Tensor) -> Tensor | None:
        """Where a code says what x is, ``[B, c, H, W]`` bool: not where x has no value (void pixels of a mask). There
        the code is to be 0, and no term of the loss asks for it. None: everywhere."""
        return None

    def readout(self, z: Tensor) -> Tensor:
        """Matched-filter responses ``[B, readout_dim]`` of a noisy ``z [B, c, H, W]`` to this encoder's codes.

        A code spread over the whole space (a label's, say) is found by inner products with its codebook, which a
        convolution cannot compute; the backbone receives them beside z.
        """
        return z.new_zeros(z.shape[0], 0)


class Decoder(nn.Module, ABC):
    """D_i: a head that maps the shared features to the parameters of p(x_i | z_t, observed).

    Attributes:
        dims: number of scalar dimensions of one x, the most that it may have: the loss and the bound are per dimension.
    """

    dims: int = 1

    @abstractmethod
    def forward(self, features: Features) -> Params:
        """Parameters of p(x_i | .), unconstrained, with the batch first."""

    @abstractmethod
    def nll(self, params: Params, x: Tensor) -> Tensor:
        """Exact −log p(x | params) in nats, summed over the dimensions of x: ``[B]``.

        A loss gives params of at least 32 bits, whatever the decoder computes in.
        """

    def dims_of(self, x: Tensor) -> Tensor:
        """How many dimensions of each x ``[B, ...]`` count in its :meth:`nll`: int64 ``[B]``, from 0 to :attr:`dims`.

        By default all of them. Override it where samples differ: pixels without a value, texts of several lengths.
        """
        return torch.full((len(x),), self.dims, device=x.device)

    def objective(self, params: Params, x: Tensor) -> Tensor:
        """The training objective of L2, per dimension: ``[B]``. By default :meth:`nll` over :meth:`dims_of`."""
        return self.nll(params, x) / self.dims_of(x).clamp(min=1)

    @abstractmethod
    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        """ê = E[encoder(x) | params]: ``[B, c, H, W]``; not the code of the most likely x."""

    @abstractmethod
    def mode(self, params: Params) -> Tensor:
        """The most likely x: ``[B, ...]``."""

    @abstractmethod
    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        """A draw x ~ p(x | params): ``[B, ...]``."""


class Modality(nn.Module, ABC):
    """One modality instance: its encoder and decoder, and what it takes to check, show, judge, read and write its data.

    Attributes:
        loss_weight: λ_i, the scale of this modality's part of L2.
        snr_clamp: its weight over t is clamp(SNR_t, low, high): (1, 1) is uniform, (0, γ) min-SNR-γ (Hang et al. 2023).
        field: the data set's field that x comes from; None means the instance's own name.
        moves: how x is to be moved when the sample it belongs to is mirrored or cropped: as an "image" (values may be
            blended) or a "mask" (they may not); None: it does not show where things are.
        coloured: whether x is a picture in [−1, 1] whose colours may be varied.
        resize: whether :meth:`parse` scales and crops a picture of another size than the data's, or refuses it.
        metric_directions: "higher" or "lower", whichever is better, by name of a metric of :meth:`metrics` or
            :meth:`predictive_metrics`, what tells most first. A metric without one is reported but never ranked.
    """

    metric_directions: Mapping[str, str] = MappingProxyType({})
    loss_weight: float = 1.0
    snr_clamp: tuple[float, float] = (1.0, 1.0)
    field: str | None = None
    moves: Literal["image", "mask"] | None = None
    coloured: bool = False
    resize: bool = True
    derived: bool = False
    """Whether x is computed from another field by :meth:`derive` (an embedding of an image, say)."""
    derived_by: str = ""
    """What :meth:`derive` depends on beside the configuration and the code, such as the weights of a frozen network:
    derived values are kept under it, so it changes whenever they do."""
    stored_dtypes: Collection[torch.dtype] = ()
    """Dtypes, none of them x's own, in which a data set may give what it stores in place of x. Batches are then small
    on their way to the device, where :meth:`from_stored` makes x of them."""
    data_field: Any = None
    """How the data set that a model is trained on reads the files of :attr:`field`, a
    ``mtdiffusion_registry.DataField``; None: it has no files, or does not say. The engine sets it; :meth:`parse` is to
    read a person's file as the data set does."""
    fit_samples: int = 0
    """How many samples of its source field :meth:`fit` is to see before anything is derived; 0: none, or no more."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Raise ``ValueError`` if the batch x has a wrong shape, dtype or range: what was found, what is expected."""

    @abstractmethod
    def placeholder(self, batch: int) -> Tensor:
        """A valid x ``[batch, ...]`` to stand in for samples without this modality; its values are never used."""

    @abstractmethod
    def render(self, x: Tensor) -> Tensor:
        """Pictures of x for a person: ``[B, 3, h, w]`` in [0, 1]."""

    @property
    def legend(self) -> Sequence[tuple[str, tuple[int, int, int]]]:
        """What colours of :meth:`render` mean, names and RGB in 0..255, where a person must be told; () by default."""
        return ()

    @property
    def input_spec(self) -> InputSpec:
        """How a person may give one x on a page; by default as on the command line, a file or a line of text."""
        return InputSpec()

    @abstractmethod
    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        """Means over a batch of pairs, such as ``{"accuracy": 0.97}``: how close generated is to the truth."""

    def predictive_metrics(self, params: Params, truth: Tensor) -> dict[str, float]:
        """Means over a batch: how well the head's distribution predicts the truth.

        Args:
            params: the decoder's, of one evaluation of the network given what is observed: nothing is sampled.
            truth: ``[B, ...]``.

        Returns:
            Metrics by names that :meth:`metrics` does not use; by default none.
        """
        return {}

    def similarity(self, x: Tensor, candidates: Tensor) -> Tensor | None:
        """How alike each x ``[B, ...]`` is to each candidate ``[N, ...]``: ``[B, N]``, larger is nearer.

        For data whose pictures tell a person little, such as embeddings: figures show real samples near to x, too. By
        default None, of data that can be seen.
        """
        return None

    def derive(self, source: Tensor | Sequence[str]) -> Tensor:
        """x from its source field, a batch at a time. Called once for a data set and kept.

        Args:
            source: ``[B, ...]``; or the texts, where the field holds such.

        Raises:
            ValueError: if it cannot be made from them; by default, of texts.
        """
        if not isinstance(source, Tensor):
            raise ValueError("found texts, expected tensors")
        return source

    def fit(self, source: Tensor | Sequence[str]) -> None:
        """Learn what :meth:`derive` has to know of all data, such as principal components, before it is called.

        What was learned is to be in buffers, and :attr:`fit_samples` 0 from then on, of a trained model too. By default
        nothing is learned.

        Args:
            source: as of :meth:`derive`: a draw of the training split, always the same, of at most
                :attr:`fit_samples`, which must not be 0.

        Raises:
            ValueError: if it cannot be learned from them.
        """

    def measure(self, x: Tensor) -> None:
        """Learn the scale of derived x ``[n, ...]``, some thousand of the training split, before anything is trained.

        Called whenever a derived modality's training split is loaded, of a trained model too: what was measured is to
        be in buffers, with one that says that it was, and is then to stay as it is. By default nothing is measured.

        Raises:
            ValueError: if a modality cannot be trained on them.
        """

    def mend(self, x: Tensor, visible: Tensor) -> Tensor:
        """x ``[B, ...]`` that is put together from what was observed and what was generated, made one: renormalised,
        say, where the whole has to keep a norm that its parts cannot. By default as it is.

        Args:
            visible: ``[B, h, w]``: 1 where x was observed, 0 where it was generated.
        """
        return x

    def judged(self, x: Tensor) -> Tensor:
        """x ``[B, ...]`` as evaluators see it, by default as it is: where x stands for a picture, such as a latent of
        an autoencoder, the picture, float32 ``[B, channels, h, w]`` in [−1, 1] on the CPU."""
        return x

    def from_stored(self, stored: Tensor) -> Tensor:
        """x of what a data set stores, in x's shape ``[B, ...]``, one of :attr:`stored_dtypes` and on any device.

        :meth:`Dataset.stored` says what the dtypes mean. Zeros, which stand for what samples lack, give a valid x. It
        is compiled with the network, and does not wait for the device. By default as it is.
        """
        return stored

    def check_data_field(self) -> None:
        """Raise ``ValueError`` if :attr:`data_field` shows, before anything is read, that the data mean something else
        by their values than this modality does. By default nothing is looked at."""

    def check_stored(self, stored: Tensor) -> None:
        """:meth:`check` of what a data set stores; by default of the x made of it, which takes longer than looking at
        the stored values where these tell as much."""
        self.check(self.from_stored(stored))

    def from_text(self, text: str) -> Tensor:
        """One x (no batch axis) from a text that a data set holds in its field: a caption, the name of a class.

        Raises:
            ValueError: if it is none; by default always, of modalities that read tensors.
        """
        raise ValueError(f"found the text {text!r}, expected a tensor")

    @abstractmethod
    def parse(self, text: str) -> Tensor:
        """One x (no batch axis) from a value or a file's path, as given on the command line.

        Raises:
            ValueError: if it is neither; the message says what was found and what is expected.
        """

    @abstractmethod
    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        """Write one x (no batch axis) to ``folder/stem.<suffix that suits it>``; returns the path."""

    def cells(self, x: Tensor) -> Mapping[str, int | float | str]:
        """One x (no batch axis) as a row of a table, for what is a number or a word: many small files serve nobody.

        Returns:
            Cells by column. ``value`` is x, as a data set of tables reads it in this modality's field; others tell a
            person more. By default none: x is written to a file, by :meth:`write`.
        """
        return {}


class Backbone(nn.Module, ABC):
    """The shared denoiser. Knows nothing of modalities.

    Attributes:
        features: the shapes of what :meth:`forward` returns.
    """

    features: FeatureSpec

    @abstractmethod
    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        """Features of a noisy latent.

        Args:
            z: ``[B, in_channels, H, W]``: the scaled z_t, and what else the layout shows place by place.
            noise: ``[B]`` in [0, 1]: the noise level of the noisiest modality (0 is data, 1 is noise); in float32 where
                z has 16 bits, too few for an angle of many turns.
            vector: ``[B, in_vector]``: the modalities' clocks (or flags) and read-outs.
        """

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The blocks that most of :meth:`forward` is made of, in whichever order; by default none are told.

        Training may forget what happens inside of them, and compute it again on the way back (Chen et al. 2016), for
        less memory. So each is a submodule, none lies within another, and :meth:`forward` calls it as a module, with
        tensors (or None), to the same end each time.
        """
        return ()


class WeightSchedule(ABC):
    """The weights w_t^(i) with which modalities enter, given from either end (docs/mathematics.md, section 2)."""

    @abstractmethod
    def signal(self, retention: Retention, modalities: int) -> Tensor:
        """Signal coefficients m ``[T + 1, N]`` (float64), m_0 first."""


class ClockLaw(ABC):
    """Which clocks are seen together in training, and along which path sampling takes them (docs/mathematics.md, 7).

    Clocks are shares of T: 0 is data, 1 is noise.

    Attributes:
        shared: whether all modalities always have one clock; a shared layout needs that.
    """

    shared: bool = False

    @abstractmethod
    def draw(self, batch: int, modalities: int, generator: torch.Generator | None = None) -> Tensor:
        """Clocks of a training batch ``[batch, N]`` in [0, 1], on the CPU. A modality at 0 is seen clean."""

    def ahead(self, modalities: int) -> Tensor:
        """How far ahead of the slowest each modality runs in sampling, in shares of T ``[N]``; by default 0 for all.

        At position u of the path, which falls to 0, the clock of modality i is clamp(u − ahead_i, 0, 1).
        """
        return torch.zeros(modalities, dtype=torch.float64)


class Dataset(ABC):
    """A map-style data set: sample i is a dict of fields; a field that a sample lacks is missing from its dict.

    Field conventions: an image is float32 ``[channels, h, w]`` in [−1, 1]; a mask int64 ``[h, w]`` of class indices; a
    label an int64 scalar ``[]``; an embedding float32 ``[D]`` of unit norm; a caption, or a class by its name, a
    ``str``.

    Attributes:
        fingerprint: of all that the data set holds, which changes whenever a sample does: what is computed from the
            samples is kept under it. None: it is not known, and nothing is kept.
        class_names: by field, what the data call the classes that its numbers stand for, from 0, so that a modality
            that names them otherwise is noticed. Empty: the data name none.
    """

    fingerprint: str | None = None
    class_names: Mapping[str, Sequence[str]] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Tensor | str]: ...

    def varied(self, index: int, seed: int) -> dict[str, Tensor | str]:
        """Sample ``index`` as it is at one of its turns in training, where that differs from turn to turn: a picture
        with a sound drawn anew from those of its class, a recording moved in time. By default as it always is.

        Whatever is drawn follows from ``seed`` alone, another for each turn, so that a training that is resumed goes on
        as if it had not stopped. Evaluation, and modalities that are derived, go by the sample as it always is; a field
        that one is derived from is to stay the same.
        """
        return self[index]

    def without(self, fields: Collection[str]) -> Dataset:
        """The same samples less these fields, which spares reading them where what was made of them is kept; by default
        itself."""
        return self

    def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> Dataset:
        """The same samples, some of these fields as they are stored where that has one of these dtypes, by field; by
        default itself, all fields as they are otherwise.

        uint8 0..255 stands for float32 in [−1, 1], k for k/127.5 − 1, and a narrow integer for the same int64. What
        other dtypes stand for is between a data set and the modality that takes them (:meth:`Modality.from_stored`).
        """
        return self

    def describe(self, index: int, field: str | None = None) -> str:
        """What an error calls a sample, or a field of it, so that a person finds it: its stem, or its file."""
        return f"sample {index}"

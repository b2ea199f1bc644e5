"""Declaration of a likelihood: heads and formulas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy.sparse import csr_matrix

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """Parameter that a likelihood needs for every cell and gene.

    Parameters
    ----------
    name
        Key of the parameter in the formulas.
    meaning
        Description of the parameter, for documentation and error messages.
    is_dispersion
        Whether the parameter may be shared by all cells (``dispersion="gene"`` or ``"gene-batch"``) instead of decoded.
    initial
        Value at which its bias starts. The bias of the rate starts at the log mean of each gene instead.
    """

    name: str
    meaning: str
    is_dispersion: bool = False
    initial: float = 0.0


#: The head that every count likelihood has.
RATE = Head("log_rate", "log of the mean count λ before zero inflation")


class Likelihood(ABC):
    """A count distribution, evaluated on tensors of any broadcastable shape.

    Subclasses declare ``heads`` and the formulas below; ``params`` maps head names to tensors.
    """

    heads: ClassVar[tuple[Head, ...]] | tuple[Head, ...]
    formula: str  #: log p(x) in the symbols of the documentation
    #: Kind of p(x): a probability of ``"counts"`` or of ``"detection"`` (whether x > 0), or a ``"density"`` of x.
    measures: str = "counts"
    #: Whether the rates of a cell add up to its size factor: λ = size · softmax(f) over all genes, not size · exp(f).
    normalizes_rates: bool = False
    #: Whether λ is e^log_rate, and so grows with the size factor; otherwise see `rate`.
    rate_is_head: bool = True
    support = constraints.nonnegative_integer  #: values of x that may be drawn

    @property
    def is_density(self) -> bool:
        """Whether p(x) is a density, which has no upper bound."""
        return self.measures == "density"

    def observed(self, counts: csr_matrix) -> csr_matrix:
        """Values whose probability p(x) is: the counts, or whether they are above 0."""
        return counts.sign() if self.measures == "detection" else counts

    def start(self, mean: Tensor) -> Params:
        """Values at which heads start, (g,) each, where the mean count of each gene is ``mean``, (g,) and positive.

        The rate starts at that mean, and a head that is left out at its ``initial``.
        """
        return {}

    @abstractmethod
    def log_prob_zero(self, params: Params) -> Tensor:
        """Log p(0), in nats."""

    @abstractmethod
    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        """Log p(x) − log b(x) in nats where x > 0, with b the base measure; finite, but not meaningful, at x = 0."""

    def log_base_measure(self, x: Tensor) -> Tensor:
        """Log b(x), in nats: the factor of p(x) that no parameter enters, 1/x! unless declared otherwise."""
        return -torch.lgamma(x + 1)

    @abstractmethod
    def mean(self, params: Params) -> Tensor:
        """E[x], in counts, zero inflation included."""

    @abstractmethod
    def variance(self, params: Params) -> Tensor:
        """Var[x], in counts squared."""

    @abstractmethod
    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts, of the broadcast shape of the parameters."""

    def rate(self, params: Params) -> Tensor:
        """λ, in counts: the mean count before zero inflation, unless the likelihood says otherwise."""
        return params[RATE.name].exp()

    def log_prob_positive(self, x: Tensor, params: Params) -> Tensor:
        """Log p(x) in nats where x > 0; finite, but not meaningful, at x = 0."""
        return self.log_kernel(x, params) + self.log_base_measure(x)

    def log_prob(self, x: Tensor, params: Params) -> Tensor:
        """Log p(x) in nats for any count x."""
        return torch.where(x > 0, self.log_prob_positive(x, params), self.log_prob_zero(params))

    def differentiate_zero(self, params: Params) -> tuple[Tensor, Params]:
        """Log p(0), and its derivative by each head, element by element; all of the broadcast shape."""
        return differentiate(self.log_prob_zero, params)

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        """Log p(x) − log b(x) where x > 0, and its derivative by each head; all of the broadcast shape."""
        return differentiate(lambda heads: self.log_kernel(x, heads), params)

    def kernel_constants(self, x: Tensor, shared: Params) -> Params:
        """Terms of the kernel that depend only on x and the heads that all rows share, by names that no head has.

        A batch holds each x once, but the components of a mixture and the samples of a cell repeat it. These terms are
        computed once, and passed with the parameters to `log_kernel` and `differentiate_kernel`. A likelihood that
        declares them must declare `differentiate_kernel` too, with the derivatives of these terms.
        """
        return {}

    def shared_heads(self, dispersion: str) -> tuple[Head, ...]:
        """Heads that all cells share, or those of a batch, and that are not decoded."""
        return tuple(head for head in self.heads if head.is_dispersion and dispersion != "gene-cell")

    def complexity(self, dispersion: str) -> tuple[int, int]:
        """Numbers of heads that are decoded and that are shared; in this order, how many parameters a gene has.

        A decoded head has a weight of each hidden unit for every gene, a shared one a number (or one for each batch).
        """
        n_shared = len(self.shared_heads(dispersion))
        return len(self.heads) - n_shared, n_shared

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the declared heads."""
        return tuple(head.name for head in self.heads)


def differentiate(function: Callable[[Params], Tensor], params: Params) -> tuple[Tensor, Params]:
    """Value of an elementwise function of parameters and its derivative by each, all of the broadcast shape."""
    shape = torch.broadcast_shapes(*(value.shape for value in params.values()))
    with torch.enable_grad():
        leaves = {name: value.detach().expand(shape).requires_grad_() for name, value in params.items()}
        result = function(leaves)
        gradients = torch.autograd.grad(result.sum(), leaves.values(), materialize_grads=True)
    return result.detach(), {name: value.contiguous() for name, value in zip(params, gradients, strict=True)}

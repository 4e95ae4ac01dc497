"""TRPO: the natural gradient of a policy over a vocabulary, and a step within its trust region.

The policy is a function without arguments: a closure over a model, whose parameters are to be
trained, and a batch. It returns logits or, where a head is given, the hidden states that enter it.
Dropout has to be off, so that the policy returns the same each time.

    step.py                a step: along the natural gradient, as far as an exact KL allows. Begin
                           here: it calls the others
    fisher.py              the Fisher matrix of the parameters times a vector, never the matrix
    conjugate_gradient.py  solves F x = g by such products; knows nothing of policies
    policy.py              the policy on this rank's part of a batch, its head, sums over ranks
    parameters.py          the parameters as one vector

Where torch.distributed is initialised, each rank's batch is a part of one: counts of tokens,
gradients, F v, KL and surrogate are summed over all ranks, or over those of a `group`. So the
parameters stay the same on all of these. A rank may have any number of tokens, none included.
"""

from .conjugate_gradient import conjugate_gradient
from .fisher import fisher_vector_product
from .step import TrustRegionInfo, trpo_step

__all__ = ["TrustRegionInfo", "conjugate_gradient", "fisher_vector_product", "trpo_step"]

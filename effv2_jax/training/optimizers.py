"""The optimizers of the released code as optax transformations, with TensorFlow 1's formulas.

They differ from optax's own in ways that change a run: where epsilon stands, what the slots start
at, and on which side of the momentum the learning rate is. The learning rate is an argument of
`update`, so that a schedule and a stage can change it without a new program:

    updates, state = optimizer.update(gradients, state, params, learning_rate=rate)
    params = optax.apply_updates(params, updates)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

SquaredNorms = Callable[[optax.Updates], optax.Updates]
Optimizer = optax.GradientTransformationExtraArgs

NAMES = ("rmsprop", "momentum", "sgd", "adam", "adamw")


class RMSPropState(NamedTuple):
    """Slots of `rmsprop`, shaped as the parameters."""

    mean_square: optax.Updates
    momentum: optax.Updates


class MomentumState(NamedTuple):
    """Slot of `momentum`, shaped as the parameters."""

    accumulator: optax.Updates


class AdamState(NamedTuple):
    """Slots of `adam`; count is the number of updates made, int32."""

    count: jax.Array
    first_moment: optax.Updates
    second_moment: optax.Updates


def make_optimizer(name: str) -> Optimizer:
    """Returns an optimizer by name with the official constants (official: utils.py).

    adamw is adam; its decay is `decoupled_decay`, which goes with any optimizer.
    """
    makers = {
        "rmsprop": rmsprop,
        "momentum": momentum,
        "sgd": sgd,
        "adam": adam,
        "adamw": adam,
    }
    return makers[name]()


def rmsprop(*, decay: float = 0.9, momentum: float = 0.9, epsilon: float = 1e-3) -> Optimizer:
    """RMSProp with momentum.

    ms = decay ms + (1 - decay) g^2, starting at ONE; mom = momentum mom + lr g / sqrt(ms +
    epsilon); p -= mom. A later learning rate does not rescale the old momentum.
    """

    def init(params: optax.Params) -> RMSPropState:
        return RMSPropState(
            mean_square=jax.tree.map(jnp.ones_like, params),
            momentum=jax.tree.map(jnp.zeros_like, params),
        )

    def update(
        gradients: optax.Updates,
        state: RMSPropState,
        params: optax.Params | None = None,
        *,
        learning_rate: jax.typing.ArrayLike,
        **_: object,
    ) -> tuple[optax.Updates, RMSPropState]:
        del params
        mean_square = jax.tree.map(
            lambda ms, g: ms + (jnp.square(g) - ms) * (1 - decay), state.mean_square, gradients
        )
        velocity = jax.tree.map(
            lambda mom, g, ms: momentum * mom + learning_rate * g * jax.lax.rsqrt(ms + epsilon),
            state.momentum,
            gradients,
            mean_square,
        )
        return jax.tree.map(jnp.negative, velocity), RMSPropState(mean_square, velocity)

    return Optimizer(init, update)


def momentum(*, momentum: float = 0.9) -> Optimizer:
    """Momentum: acc = momentum acc + g; p -= lr acc. The learning rate is outside."""

    def init(params: optax.Params) -> MomentumState:
        return MomentumState(jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: optax.Updates,
        state: MomentumState,
        params: optax.Params | None = None,
        *,
        learning_rate: jax.typing.ArrayLike,
        **_: object,
    ) -> tuple[optax.Updates, MomentumState]:
        del params
        accumulator = jax.tree.map(lambda a, g: momentum * a + g, state.accumulator, gradients)
        updates = jax.tree.map(lambda a: -learning_rate * a, accumulator)
        return updates, MomentumState(accumulator)

    return Optimizer(init, update)


def sgd() -> Optimizer:
    """Gradient descent: p -= lr g."""

    def update(
        gradients: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        learning_rate: jax.typing.ArrayLike,
        **_: object,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        return jax.tree.map(lambda g: -learning_rate * g, gradients), state

    return Optimizer(lambda params: optax.EmptyState(), update)


def adam(*, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> Optimizer:
    """Adam in the "epsilon hat" form of its paper's section 2.

    lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t); p -= lr_t m / (sqrt(v) + epsilon).
    """

    def init(params: optax.Params) -> AdamState:
        return AdamState(
            count=jnp.zeros([], jnp.int32),
            first_moment=jax.tree.map(jnp.zeros_like, params),
            second_moment=jax.tree.map(jnp.zeros_like, params),
        )

    def update(
        gradients: optax.Updates,
        state: AdamState,
        params: optax.Params | None = None,
        *,
        learning_rate: jax.typing.ArrayLike,
        **_: object,
    ) -> tuple[optax.Updates, AdamState]:
        del params
        count = state.count + 1
        t = count.astype(jnp.float32)
        rate = learning_rate * jnp.sqrt(1 - jnp.power(beta2, t)) / (1 - jnp.power(beta1, t))
        first = jax.tree.map(lambda m, g: m + (g - m) * (1 - beta1), state.first_moment, gradients)
        second = jax.tree.map(
            lambda v, g: v + (jnp.square(g) - v) * (1 - beta2), state.second_moment, gradients
        )
        updates = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + epsilon), first, second)
        return updates, AdamState(count, first, second)

    return Optimizer(init, update)


def decoupled_decay(optimizer: Optimizer, decay: float, *, mask: optax.Params) -> Optimizer:
    """Adds decoupled weight decay, p -= lr decay p, to an optimizer (arXiv:1711.05101).

    Args:
      optimizer: any of this module.
      decay: factor of learning rate times parameter.
      mask: tree of bool shaped as the parameters: which ones decay.
    """

    def update(
        gradients: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        learning_rate: jax.typing.ArrayLike,
        **extra: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = optimizer.update(
            gradients, state, params, learning_rate=learning_rate, **extra
        )
        updates = jax.tree.map(
            lambda u, p, decays: u - learning_rate * decay * p if decays else u,
            updates,
            params,
            mask,
        )
        return updates, state

    return Optimizer(optimizer.init, update)


def only_trainable(optimizer: Optimizer, mask: optax.Params) -> Optimizer:
    """Restricts an optimizer to some parameters; the others get no update and no slots.

    Args:
      optimizer: any of this module.
      mask: tree of bool shaped as the parameters: True is trained, False is frozen.
    """
    frozen = jax.tree.map(lambda trained: not trained, mask)
    return optax.chain(
        optax.masked(optimizer, mask),
        optax.masked(optax.set_to_zero(), frozen),
    )


class GradientNorms(NamedTuple):
    """Norms before clipping, float32 scalars."""

    all: jax.Array  # of all gradients together
    largest: jax.Array  # the largest norm of a single gradient


def squared_norms(tree: optax.Updates) -> optax.Updates:
    """Returns the sum of squares of every array, float32 scalars."""
    return jax.tree.map(lambda x: jnp.sum(jnp.square(x)), tree)


def gradient_norms(
    gradients: optax.Updates, *, squared_norms: SquaredNorms = squared_norms
) -> GradientNorms:
    """Returns the norms that the official code reports as gnorm and gnormmax.

    Args:
      gradients: of all parameters.
      squared_norms: says what the squared norm of each is, where a device has only parts.
    """
    squares = jnp.stack(jax.tree.leaves(squared_norms(gradients)))
    return GradientNorms(all=jnp.sqrt(jnp.sum(squares)), largest=jnp.sqrt(jnp.max(squares)))


def clip_gradients(
    gradients: optax.Updates, limit: float, *, squared_norms: SquaredNorms = squared_norms
) -> optax.Updates:
    """Clips every gradient to norm `limit`, then all together to `limit` (official: main.py).

    Args:
      gradients: of all parameters.
      limit: its sign does not count.
      squared_norms: as of `gradient_norms`.
    """
    limit = abs(limit)
    clipped = jax.tree.map(
        lambda g, square: g * (limit / jnp.maximum(jnp.sqrt(square), limit)),
        gradients,
        squared_norms(gradients),
    )
    norm = gradient_norms(clipped, squared_norms=squared_norms).all
    return jax.tree.map(lambda g: g * (limit / jnp.maximum(norm, limit)), clipped)

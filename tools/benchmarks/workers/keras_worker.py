"""keras.applications on JAX or TensorFlow: `python keras_worker.py`, see serve.py.

KERAS_BACKEND says on which. Dropout and stochastic depth are set to zero, as everywhere else here.
Keras' own loop and a step written with the backend's means are both tried, the faster is kept.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "XLA_FLAGS" in os.environ:
    # Cores as devices are of use to a program that is split over them; Keras' is not.
    flags = os.environ["XLA_FLAGS"].split()
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)

import keras
import numpy as np
from serve import Prepared, fastest, serve

Run = Callable[[int], None]


def _network(task: Mapping[str, Any]) -> keras.Model:
    name = task["peer_model"]
    options = {"include_preprocessing": False} if "V2" in name else {}
    network = getattr(keras.applications, name)(
        weights=None,
        input_shape=(task["image_size"], task["image_size"], 3),
        classes=task["num_classes"],
        classifier_activation=None,
        **options,
    )
    for layer in network.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return network


def _loss(labels: Any, logits: Any) -> Any:
    logits = keras.ops.cast(logits, "float32")
    losses = keras.ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return keras.ops.mean(losses)


def _keras_run(network: keras.Model, images: Any, labels: Any, training: bool) -> Run:
    jit = keras.backend.backend() == "jax"  # TensorFlow on a CPU: six times slower with it
    network.compile(optimizer=keras.optimizers.SGD(1e-3), loss=_loss, jit_compile=jit)

    def run(steps: int) -> None:
        for _ in range(steps):
            if training:
                network.train_on_batch(images, labels)  # returns numbers: it waits
            else:
                network.predict_on_batch(images)

    return run


def _tensorflow_run(
    network: keras.Model, images: Any, labels: Any, training: bool, **options: Any
) -> Run:
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(network.trainable_variables)

    @tf.function(**options)
    def train(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            value = _loss(labels, network(images, training=True))
        gradients = tape.gradient(value, network.trainable_variables)
        optimizer.apply(gradients, network.trainable_variables)
        return value

    @tf.function(**options)
    def infer(images: Any, labels: Any) -> Any:
        return network(images, training=False)

    step = train if training else infer

    def run(steps: int) -> None:
        for _ in range(steps):
            value = step(images, labels)
        value.numpy()

    return run


def _jax_run(network: keras.Model, images: Any, labels: Any, training: bool) -> Run:
    import jax

    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(network.trainable_variables)

    def loss(trained: Any, others: Any, images: Any, labels: Any) -> Any:
        logits, others = network.stateless_call(trained, others, images, training=True)
        return _loss(labels, logits), others

    def train(state: Any, images: Any, labels: Any) -> Any:
        trained, others, slots = state
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, others), gradients = gradient(trained, others, images, labels)
        trained, slots = optimizer.stateless_apply(slots, gradients, trained)
        return (trained, others, slots), value

    def infer(state: Any, images: Any, labels: Any) -> Any:
        return state, network.stateless_call(state[0], state[1], images, training=False)[0]

    step = jax.jit(train, donate_argnums=0) if training else jax.jit(infer)
    variables = (network.trainable_variables, network.non_trainable_variables, optimizer.variables)
    state = jax.tree.map(jax.numpy.array, tuple([v.value for v in part] for part in variables))

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, value = step(state, images, labels)
        jax.block_until_ready((state, value))

    return run


def _prepare(task: Mapping[str, Any]) -> Prepared:
    training = task["mode"] == "train"
    rng = np.random.default_rng(0)
    shape = (task["batch"], task["image_size"], task["image_size"], 3)
    images = rng.standard_normal(shape, np.float32)
    labels = rng.integers(0, task["num_classes"], task["batch"], dtype=np.int32)
    if task["dtype"] == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    if keras.backend.backend() == "tensorflow":
        import tensorflow as framework

        framework.config.threading.set_intra_op_parallelism_threads(task["threads"])
        framework.config.threading.set_inter_op_parallelism_threads(task["threads"])
        accelerators = framework.config.list_physical_devices("GPU")
        for accelerator in accelerators:
            framework.config.experimental.set_memory_growth(accelerator, True)
        given = framework.constant(images), framework.constant(labels)
        ways = {"tf.function": lambda: _tensorflow_run(network, *given, training)}
        if accelerators and task["compile"] != "off":
            ways["tf.function, jit_compile"] = lambda: _tensorflow_run(
                network, *given, training, jit_compile=True
            )
        settings = f"oneDNN, {task['threads']} threads"
    else:
        import jax as framework

        accelerators = framework.default_backend() != "cpu"
        given = framework.device_put((images, labels))
        ways = {"jax.jit": lambda: _jax_run(network, *given, training)}
        settings = os.environ.get("XLA_FLAGS") or "XLA as shipped"
    network = _network(task)
    ways[f"{'train' if training else 'predict'}_on_batch"] = lambda: _keras_run(
        network, *given, training
    )
    run, facts = fastest(ways, task.get("candidate"))
    facts |= {
        "settings": ", ".join([facts["candidate"], settings, keras.config.dtype_policy().name]),
        "versions": {
            "keras": keras.__version__,
            keras.backend.backend(): framework.__version__,
            "python": sys.version.split()[0],
        },
        "device": "accelerator" if accelerators else "cpu",
        "param_count": sum(int(np.prod(v.shape)) for v in network.trainable_variables),
    }
    return Prepared(run=run, facts=facts)


if __name__ == "__main__":
    serve(_prepare)

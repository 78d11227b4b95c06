"""A tiny network, for files that hold its variables."""

import pytest

from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model


@pytest.fixture(scope="package")
def model():
    return create_model("testing", num_classes=3)


@pytest.fixture(scope="package")
def variables(model):
    return init_variables(model, 0)

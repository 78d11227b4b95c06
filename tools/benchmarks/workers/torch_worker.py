"""timm and torchvision on PyTorch: `python torch_worker.py timm|torchvision`, see serve.py.

With what makes PyTorch fast: channels_last, fused SGD, no gradients kept in inference, bfloat16 by
autocast in training and of the weights themselves in inference, cuDNN's autotuner, TF32, and
torch.compile where it works and is faster.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from serve import Prepared, fastest, serve

# PyTorch compiles for inference only with constants for weights when told so.
_COMPILED = {
    "cpu": {"compiled": {}},
    "cuda": {"compiled": {}, "compiled with CUDA graphs": {"mode": "reduce-overhead"}},
}


def _network(task: Mapping[str, Any]) -> torch.nn.Module:
    name, classes = task["peer_model"], task["num_classes"]
    if task["peer"] == "torchvision":
        models = importlib.import_module("torchvision.models")
        options = {"dropout": 0.0, "stochastic_depth_prob": 0.0}
        return models.get_model(name, weights=None, num_classes=classes, **options)
    timm = importlib.import_module("timm")
    # Symmetric padding, PyTorch's own: TensorFlow's needs a padded copy at every stride.
    options = {"pad_type": ""} if name.startswith("tf_") else {}
    return timm.create_model(name, num_classes=classes, **options)


def _prepare(task: Mapping[str, Any]) -> Prepared:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(task["threads"])
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    training = task["mode"] == "train"
    low = task["dtype"] == "bfloat16"
    size, batch = task["image_size"], task["batch"]
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, task["num_classes"], (batch,), device=device)
    network = _network(task).to(device).to(memory_format=torch.channels_last)
    network.train(training)
    if not training:
        importlib.import_module("torch._inductor.config").freezing = True
        if low:
            network, images = network.to(torch.bfloat16), images.to(torch.bfloat16)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def training_run(model: Callable) -> Callable[[int], None]:
        loss = torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, fused=True)

        def run(steps: int) -> None:
            for _ in range(steps):
                with torch.autocast(device, torch.bfloat16, enabled=low):
                    value = loss(model(images), labels)
                value.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            wait()

        return run

    def inference_run(model: Callable, inputs: torch.Tensor = images) -> Callable[[int], None]:
        # torch.compile takes weights for constants under no_grad, not under inference_mode.
        quiet = torch.inference_mode if model is network else torch.no_grad

        def run(steps: int) -> None:
            with quiet():
                for _ in range(steps):
                    model(inputs)
                wait()

        return run

    make = training_run if training else inference_run
    ways: dict[str, Callable[[], Callable[[int], None]]] = {}
    if task["compile"] != "on":
        ways["eager"] = lambda: make(network)
    if task["compile"] != "off":
        for name, options in _COMPILED[device].items():
            ways[name] = lambda o=options: make(torch.compile(network, **o))
    run, facts = fastest(ways, task.get("candidate"))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    settings = ["channels_last", facts["candidate"], "fused SGD" if training else "no gradients"]
    settings += ["bfloat16 autocast" if training else "bfloat16 weights"] if low else []
    settings += (
        ["cuDNN autotuned, TF32"] if device == "cuda" else [f"{torch.get_num_threads()} threads"]
    )
    facts |= {
        "settings": ", ".join(settings),
        "versions": {
            "torch": torch.__version__,
            task["peer"]: sys.modules[task["peer"]].__version__,
            "python": sys.version.split()[0],
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "param_count": sum(parameter.numel() for parameter in network.parameters()),
    }
    return Prepared(
        run=run,
        facts=facts,
        device_bytes=torch.cuda.max_memory_allocated if device == "cuda" else lambda: None,
    )


if __name__ == "__main__":
    serve(_prepare)

"""timm's loader: `python timm_loader_worker.py`, see serve.py and benchmarks/loader.py.

Up to the collated uint8 batch, which timm normalises on the device like this project.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pipeline import Run, timed, trial
from serve import Prepared, fastest, serve


def _prepare(task: Mapping[str, Any]) -> Prepared:
    # Not before `serve` has taken the standard output: timm's imports may print there.
    import timm
    from timm.data import ImageDataset, create_loader

    class Endless(ImageDataset):
        """The pictures of the folder over and over: workers must not start anew in between."""

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index % super().__len__())

    torch.set_num_threads(1)
    size, batch, cores = task["image_size"], task["batch"], task["cores"]
    pictures = Endless(f"{task['folder']}/train")

    def make(workers: int) -> Run:
        loader = create_loader(
            pictures,
            input_size=(3, size, size),
            batch_size=batch,
            is_training=True,
            hflip=0.0,
            color_jitter=None,
            interpolation="bilinear",
            num_workers=workers,
            persistent_workers=False,  # they would go on while others are measured
            pin_memory=False,
            device=torch.device("cpu"),
        )

        def start() -> Iterator[Any]:
            return iter(loader.loader)  # below it: float32 and normalisation, the device's work

        return timed(start, warm=2 * workers + 1)

    ways = {f"{number} processes": lambda n=number: make(n) for number in (cores, 2 * cores)}
    ways["the main process"] = lambda: make(0)
    run, facts = fastest(ways, task.get("candidate"), trial=trial(batch))
    facts["settings"] = f"timm {timm.__version__}, torch {torch.__version__}, {facts['candidate']}"
    return Prepared(run=run, facts=facts)


if __name__ == "__main__":
    serve(_prepare)

"""Predictions for pictures, written as text and as pictures: what tools/predict.py does."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effv2_jax.command import say, write_text, written
from effv2_jax.data.imagenet import readable
from effv2_jax.errors import UserError
from effv2_jax.inference.forward import BatchProgram, forward
from effv2_jax.inference.grad_cam import DEFAULT_LAYER, check_layer, heat_maps
from effv2_jax.inference.pictures import folder_name
from effv2_jax.inference.predictions import (
    Answer,
    Prediction,
    as_csv,
    as_json,
    as_table,
    best_classes,
)
from effv2_jax.inference.progress import Progress
from effv2_jax.inference.reading import Batch, Picture, PictureReader
from effv2_jax.inference.weights import Weights, open_for_use
from effv2_jax.report import contact_sheet
from effv2_jax.report.heat_map import draw_heat_map
from effv2_jax.startup import enable_compilation_cache

_SHEET_LIMIT = 10 * contact_sheet.PER_PAGE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        weights: a weights file, or NAME:WEIGHTS.
        pictures: paths of the pictures, at least one.
        top_k: classes told of each picture.
        batch_size: pictures computed at a time.
        image_size: px; None: the size the weights are meant for.
        format: table, json or csv.
        out: file of the text; None: standard output.
        contact_sheet: picture of all pictures with their predictions, or None.
        attribution: folder of Grad-CAM overlays, or None.
        layer: of Grad-CAM, an endpoint of the network.
        skip_broken: leave out files that are no pictures, instead of naming them and stopping.
        labels_subset: "", or "imagenet1k" for weights of ImageNet21k.
    """

    weights: str
    pictures: Sequence[str]
    top_k: int = 5
    batch_size: int = 32
    image_size: int | None = None
    format: str = "table"
    out: str | None = None
    contact_sheet: str | None = None
    attribution: str | None = None
    layer: str = DEFAULT_LAYER
    skip_broken: bool = False
    labels_subset: str = ""


def run(request: Request) -> list[Prediction]:
    """Predicts, and writes what was asked for.

    Raises:
        UserError: the weights cannot be used, a picture is broken, or a file cannot be written.
    """
    started = time.monotonic()
    enable_compilation_cache("auto")
    weights = open_for_use(
        request.weights, image_size=request.image_size, subset=request.labels_subset
    )
    if not weights.num_classes:
        raise UserError(
            f"{request.weights}: has no classifier (0 classes), so it predicts nothing; "
            "tools/embed.py writes its features"
        )
    job = _Job(request, weights)
    predictions = job.predict()
    if not predictions:
        raise UserError(f"none of the {len(request.pictures)} files is a picture")
    job.write_contact_sheet(predictions)
    write_text(_text(request, weights, predictions, job.skipped), request.out)
    _summarise(predictions, job.skipped, seconds=time.monotonic() - started)
    return predictions


class _Job:
    """One request on its way: the programs, and what is collected for the contact sheet."""

    def __init__(self, request: Request, weights: Weights) -> None:
        self._request, self._weights = request, weights
        self.skipped: list[tuple[str, str]] = []
        self._progress = Progress(len(request.pictures))
        self._thumbnails: list[np.ndarray] = []
        options = {
            "kind": weights.kind,
            "batch_size": min(request.batch_size, len(request.pictures)),
        }
        self._forward = forward(weights.model, weights.variables, **options)
        self._heat_maps: BatchProgram | None = None
        if request.attribution is not None:
            check_layer(weights.model, request.layer)
            self._heat_maps = heat_maps(
                weights.model, weights.variables, layer=request.layer, **options
            )
        self._names = _relative_names(request.pictures)

    def predict(self) -> list[Prediction]:
        """Predicts all pictures, in their order."""
        reader = PictureReader(
            kind=self._weights.kind,
            image_size=self._weights.image_size,
            batch_size=self._forward.batch_size,
            on_broken=self._leave_out if self._request.skip_broken else None,
            views=bool(self._request.contact_sheet or self._request.attribution),
        )
        predictions: list[Prediction] = []
        for batch in reader.batches(self._request.pictures):
            predictions += self._predict_batch(batch)
            self._progress.show(len(predictions) + len(self.skipped))
        self._progress.end()
        return predictions

    def write_contact_sheet(self, predictions: Sequence[Prediction]) -> None:
        """Writes the contact sheet, if it is asked for."""
        if self._request.contact_sheet is None:
            return
        tiles = [
            contact_sheet.Tile(
                pixels=pixels,
                name=os.path.basename(each.path),
                label=readable(each.answers[0].label),
                probability=each.answers[0].probability,
                truth=None if each.truth is None else readable(each.truth),
                right=each.right,
            )
            for pixels, each in zip(self._thumbnails, predictions, strict=False)
        ]
        title = f"{self._weights.info['model']}, {self._request.weights}"
        try:
            pages = contact_sheet.write_contact_sheet(
                self._request.contact_sheet, tiles, title=title
            )
        except OSError as error:
            raise UserError(
                f"--contact-sheet {self._request.contact_sheet}: cannot be written: "
                f"{error.strerror or error}"
            ) from None
        shown = f"the first {len(tiles)} of " if len(tiles) < len(predictions) else ""
        say(f"contact sheet of {shown}{len(predictions)} pictures: {', '.join(map(str, pages))}")

    def _predict_batch(self, batch: Batch) -> list[Prediction]:
        weights = self._weights
        shares = weights.probabilities(np.asarray(self._forward(batch.images)))
        best = best_classes(shares, self._request.top_k)
        predictions = [
            _prediction(weights, picture, indices, probabilities)
            for picture, indices, probabilities in zip(batch.pictures, best, shares, strict=False)
        ]
        room = _SHEET_LIMIT - len(self._thumbnails)
        if self._request.contact_sheet:
            views = [picture.view.pixels for picture in batch.pictures[:room]]
            self._thumbnails += map(contact_sheet.small, views)
        if self._heat_maps is not None:
            classes = np.asarray([weights.output(index) for index in best[:, 0]], np.int32)
            maps = np.asarray(self._heat_maps(batch.images, classes))
            for picture, prediction, heat in zip(batch.pictures, predictions, maps, strict=False):
                self._write_heat_map(picture, prediction, heat)
        return predictions

    def _write_heat_map(self, picture: Picture, prediction: Prediction, heat: np.ndarray) -> None:
        best = prediction.answers[0]
        truth = f", is {readable(prediction.truth)}" if prediction.right is False else ""
        page = draw_heat_map(
            picture.view.pixels,
            heat,
            box=picture.view.box,
            title=f"{readable(best.label)} {best.probability:.1%}{truth}",
            facts=f"Grad-CAM of {self._request.layer}, {heat.shape[0]}x{heat.shape[1]}: "
            f"{self._names[picture.path]}",
        )
        path = Path(self._request.attribution, f"{self._names[picture.path]}.png")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--attribution {path.parent}: {error.strerror or error}") from None
        with written(path) as temporary:
            page.save(temporary, "PNG")

    def _leave_out(self, path: str, reason: str) -> None:
        self.skipped.append((path, reason))
        self._progress.line(f"left out: {path}: {reason}")


def _prediction(
    weights: Weights, picture: Picture, indices: np.ndarray, shares: np.ndarray
) -> Prediction:
    truth = weights.folders.get(folder_name(picture.path))
    return Prediction(
        path=picture.path,
        answers=tuple(Answer(int(i), weights.label(i), float(shares[i])) for i in indices),
        truth=None if truth is None else weights.label(truth),
        truth_index=truth,
    )


def _text(
    request: Request,
    weights: Weights,
    predictions: Sequence[Prediction],
    skipped: Sequence[tuple[str, str]],
) -> str:
    if request.format == "csv":
        return as_csv(predictions)
    if request.format == "table":
        return as_table(predictions)
    facts = {
        "weights": request.weights,
        "model": weights.info["model"],
        "image_size": weights.image_size,
        "preprocessing": weights.kind.name,
        "probability": "sigmoid" if weights.sigmoid else "softmax",
        "labels_subset": request.labels_subset or None,
    }
    return as_json(predictions, facts=facts, skipped=skipped)


def _relative_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path below the folder that all have in common: different files, different names."""
    full = {path: os.path.abspath(path) for path in paths}
    common = os.path.commonpath([os.path.dirname(path) for path in full.values()])
    return {path: os.path.relpath(absolute, common) for path, absolute in full.items()}


def _summarise(
    predictions: Sequence[Prediction], skipped: Sequence[tuple[str, str]], *, seconds: float
) -> None:
    parts = [f"{len(predictions):,} picture{'s' if len(predictions) != 1 else ''}"]
    known = [each.right for each in predictions if each.right is not None]
    if known:
        share = sum(known) / len(known)
        parts.append(f"{sum(known):,} of {len(known):,} like their folder's name ({share:.1%})")
    if skipped:
        parts.append(f"{len(skipped):,} left out")
    say(f"{', '.join(parts)}, {seconds:.1f} s")

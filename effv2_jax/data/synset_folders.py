"""A few classes of ImageNet, named by their synsets, as examples of all of ImageNet's classes.

Imagenette's ten folders (n01440764 ...) are classes 0, 217, 482 ... of a network of ImageNet.
Imports no JAX.
"""

from effv2_jax.data import imagenet
from effv2_jax.data.examples import Example, Source

_SYNSETS = {imagenet.NUM_1K: imagenet.synsets_1k, imagenet.NUM_21K: imagenet.synsets_21k}


class SynsetFolders:
    """The examples of a source, labelled among more classes. See `Source`."""

    def __init__(self, source: Source, label_names: tuple[str, ...]) -> None:
        """Keeps the source.

        Args:
          source: with names of classes and one class per example.
          label_names: of all classes; those of the source are among them.
        """
        self._source = source
        self._labels = [label_names.index(name) for name in source.label_names]
        self.label_names = label_names
        self.num_classes = len(label_names)
        self.in_memory = source.in_memory

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        return example._replace(label=self._labels[example.label])


def among_imagenet(source: Source, num_classes: int) -> Source:
    """Returns the source with its classes among the 1,000 or 21,843 of ImageNet.

    Args:
      source: with one class per example.
      num_classes: among how many.

    Returns:
      The source itself where its classes have no names, a name that is no synset of these, or are
      not fewer, and where there is no ImageNet of so many.
    """
    names = source.label_names
    if num_classes not in _SYNSETS or not names or len(names) >= num_classes:
        return source
    synsets = _SYNSETS[num_classes]()
    if not set(names) <= set(synsets):
        return source
    return SynsetFolders(source, synsets)

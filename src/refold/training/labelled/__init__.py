"""Images with boxes or masks, recognised by what lies in a folder."""

from refold.training.labelled.recognising import open_labelled

__all__ = ["open_labelled"]

"""A picture of what a fold did, drawn from its report alone: block by block, before beside after."""

from refold.picture.files import check_picture, save_picture
from refold.picture.layout import draw

__all__ = ["check_picture", "draw", "save_picture"]

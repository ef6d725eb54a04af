from torch import Tensor


def bright_areas_mm2(images: Tensor, pixel_mm: float) -> Tensor:
    """Area of what is brighter than mid-grey, in mm2 by image `(N,)`."""
    return (images > 0).flatten(1).sum(1) * pixel_mm**2

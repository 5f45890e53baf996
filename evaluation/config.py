"""What an evaluation reads: the data set, the k-NN protocol and the size of a batch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    data: str = ""  # folder of labelled images (evaluation/data.py says which layouts); "": label-free scores only
    k: tuple[int, ...] = (10, 20)  # neighbours that vote (DINOv2's k-NN evaluation reports 10, 20, 100 and 200)
    temperature: float = 0.07  # of the votes' softmax over cosines (DINOv2's k-NN evaluation)
    image_size: int | None = None  # pixels; none: the size each model was made for
    batch_size: int = 256  # images per forward pass (DINOv2's k-NN evaluation)
    limit: int = (
        25_600  # images that label-free scores are computed on, drawn by seed; as many as RankMe's authors take
    )
    pictures: int = 8  # images in the picture of patch tokens
    picture_size: int | None = None  # pixels of those images; more gives a finer grid of patches; none: `image_size`

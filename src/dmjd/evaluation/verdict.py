"""Did a run learn? A verdict from measurements before and after it, without labels or with them if there are any."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Kind = Literal["learned", "too little", "nothing", "collapsed", "overfitted"]
COLLAPSED = 0.05  # spread of the features below which the network does not distinguish images
FEWER = 0.5  # RankMe relative to that of the untrained network, below which the features have collapsed
PREDICTED = 0.05  # share of the variance that a branch must explain to have learned anything
STUCK = (-0.02, 0.01)  # share of the variance explained by predictions at, or close to, the mean target
GAP = 0.2  # between the shares explained of training and of held-out images, above which a run has overfitted
FEW_LOOKS = 100  # views of each image; published runs have 200 to 1600
EARLY = 20  # views of each image up to which RankMe also falls in runs that end well
FEW_IMAGES = 1000  # with fewer, pre-trained weights are the better start


class Verdict(NamedTuple):
    """The outcome of a run.

    Attributes:
        kind: The outcome in a word or two.
        line: A sentence with the numbers behind it.
        advice: What to change; empty if nothing.
    """

    kind: Kind
    line: str
    advice: str = ""

    def knowing(self, num_images: int, looks: float, *, longer: str) -> "Verdict":
        """Advise a run from random weights to train longer or on more images, if either was too little.

        Args:
            num_images: Number of training images.
            looks: How many views of each image were seen.
            longer: The flag that makes a run longer.
        """
        if self.kind == "collapsed" and looks < EARLY:
            first = (
                f"more {longer} first: each image was seen {looks:.3g} times, and RankMe also falls early in good runs"
            )
            return self._replace(advice=f"{first}; then {self.advice}")
        if self.kind != "learned":
            return self
        advice = []
        if looks < FEW_LOOKS:
            advice.append(f"more {longer}: each image was seen {looks:.3g} times, and hundreds are usual")
        if num_images < FEW_IMAGES:
            advice.append(f"more than {num_images} images, or weights of others to start from (--init)")
        return self._replace(advice="; ".join(advice))


def judge(untrained: Mapping[str, float], trained: Mapping[str, float], *, longer: str = "--epochs") -> Verdict:
    """Judge a run by the measurements of `Monitor` before and after it; `longer` is the flag that makes a run longer.

    The verdict rests on held-out images: the explained variance of their hidden tokens (`explained`), compared with
    that of training images; whether a visible branch has learned if the masked one has not (`explained_visible`); the
    spread of their features (`feature_std`) and their effective rank (`rankme`, which falls a little in good runs too);
    and, with labels, whether features are better than those of the untrained network. The bounds, except that of the
    visible branch, were set on runs that were made to fail (docs/results.md, The verdict).
    """
    explained, seen = trained["explained"], trained["explained_train"]
    said = "predictions of hidden tokens are worse than the mean target (held-out images)"
    if explained >= 0:
        said = f"predictions explain {explained:.0%} of the variance of hidden tokens (held-out images)"
    if seen > PREDICTED and seen - explained > GAP:
        return Verdict(
            "overfitted",
            f"{said}, but on training images they explain {seen:.0%}",
            "more images, or a shorter run; wider crops (--crop.scale 0.2 1); a smaller network",
        )
    # A run that learns passes the mean target, which explains nothing; one that does not learn stays there.
    gained = explained - untrained.get("explained", -1.0)  # runs started by earlier versions did not measure it
    stuck = explained < PREDICTED and (STUCK[0] < explained < STUCK[1] or gained < STUCK[1])
    visible = trained.get("explained_visible", 0.0)
    if stuck and visible < PREDICTED:
        rate = "another --optim.blr, lower where the loss jumps and higher where it hardly falls"
        return Verdict("nothing", said, f"{rate}; look at the targets in the report; more {longer}")
    before, after = untrained.get("rankme", 0.0), trained.get("rankme")  # missing for a single image
    if after is not None and (trained["feature_std"] < COLLAPSED or after < FEWER * before):
        return Verdict(
            "collapsed",
            f"features are very similar for all images (spread {trained['feature_std']:.2g}, RankMe {before:.3g} -> "
            f"{after:.3g})",
            "a lower --optim.blr; look at the images (dmjd doctor)",
        )
    if stuck:
        said += f", but those of visible tokens explain {visible:.0%}"
        return Verdict("too little", said, f"more {longer}; another --masked.target")
    if explained < PREDICTED:
        return Verdict("too little", said, f"more {longer}")
    both = [key for key in ("knn_top1", "linear_top1") if key in trained and key in untrained]
    if both and all(trained[key] < untrained[key] for key in both):
        return Verdict("too little", f"{said}, but features are worse than at the start", f"more {longer}")
    return Verdict("learned", said)

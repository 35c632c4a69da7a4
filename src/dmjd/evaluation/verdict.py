"""Did a run learn? A verdict from what is measured before and after it: without labels, and with them if there are."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Kind = Literal["learned", "too little", "nothing", "collapsed", "overfitted"]
COLLAPSED = 0.05  # spread of the features below which the network sees no difference between images
FEWER = 0.5  # RankMe of the features over that of the untrained network, below which directions were lost
PREDICTED = 0.05  # share of the tokens of a branch that has to be explained for it to have learned anything
STUCK = (-0.02, 0.01)  # what predictions explain that are the mean target, or close to it
GAP = 0.2  # between what is explained of training and of held-out images, where a run has learned them by heart
FEW_LOOKS = 100  # times that an image was seen; published runs have 200 to 1600
EARLY = 20  # looks up to which RankMe falls in runs that end well, too
FEW_IMAGES = 1000  # below which weights of others are the better start


class Verdict(NamedTuple):
    """What became of a run.

    Attributes:
        kind: In a word or two.
        line: In a sentence, with the numbers that it rests on.
        advice: What to change; empty if nothing.
    """

    kind: Kind
    line: str
    advice: str = ""

    def knowing(self, num_images: int, looks: float, *, longer: str) -> "Verdict":
        """Say what a run from random weights gains by more looks or more images, where either is short.

        Args:
            num_images: That it was trained on.
            looks: How often its views have shown each of them.
            longer: The flag that makes it longer.
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
    """Judge a run by what `Monitor` has measured before and after it; `longer` is the flag that makes it longer.

    Held-out images tell: how much of their hidden tokens is explained (`explained`), against the same of training
    images; whether a visible branch has learned where the masked one has not (`explained_visible`); how far their
    features spread (`feature_std`) and in how many directions (`rankme`, which falls a little in runs that go well,
    too); and, with labels, whether features are worth more than those of the untrained network. The bounds, but that of
    the visible branch, were set on runs that were made to go wrong (docs/results.md, The verdict).
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
    # A run on its way passes the mean target, which explains nothing; one that has no way stays there.
    gained = explained - untrained.get("explained", -1.0)  # runs begun by earlier versions have not measured it
    stuck = explained < PREDICTED and (STUCK[0] < explained < STUCK[1] or gained < STUCK[1])
    visible = trained.get("explained_visible", 0.0)
    if stuck and visible < PREDICTED:
        rate = "another --optim.blr, lower where the loss jumps and higher where it hardly falls"
        return Verdict("nothing", said, f"{rate}; look at the targets in the report; more {longer}")
    before, after = untrained.get("rankme", 0.0), trained.get("rankme")  # not of a single image
    if after is not None and (trained["feature_std"] < COLLAPSED or after < FEWER * before):
        return Verdict(
            "collapsed",
            f"features are much alike for all images (spread {trained['feature_std']:.2g}, RankMe {before:.3g} -> "
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
        return Verdict("too little", f"{said}, but features are worth less than at the start", f"more {longer}")
    return Verdict("learned", said)

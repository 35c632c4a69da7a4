"""From a path or a name to batches: what a sample is depends on nothing but (seed, epoch, index).

Sources of images: `source` (what a source is, and opening one), and a file for each kind: `folder`, and `builtin` with
the scenes of `shapes`; `memory` holds the decoded images of a small one. A new kind is one new file that registers
itself, here or in another distribution.
Images: `decode` (any file to uint8), `crops`, `random` (seeds out of numbers).
Training: `sampler` (which samples, when), `loader` (worker processes), and for each kind of sample its batch and how it
is collated: `masked` for pretraining, `labelled` for classification, `annotated` for `segmentation` and `detection`.
`packed` keeps millions of short texts in one buffer that worker processes share.
"""

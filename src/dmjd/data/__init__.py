"""From a path or a name to batches: what a sample is depends on nothing but (seed, epoch, index).

Sources of images: `source` (what a source is, and opening one), and a file for each kind: `folder`, `table` (lists),
`archive` (zip, tar and shards), `arrays`, `hub` (Hugging Face), `prepared`, and `builtin` with the scenes of `shapes`.
A new kind is one new file that registers itself, here or in another distribution. `stored` is what the kinds that are
no folders share, `listing` finds files, `packed` keeps millions of texts or numbers where all workers see them, and
`memory` holds the decoded images of a small set; `single` is an image by itself; `transfer` copies to a device.
Images: `decode` (any file to a tensor at its depth), `peek` (what its header says), `levels` and `statistics` (what its
values range over), `crops`.
Training: `sampler` (which samples, when), `loader` and its `workers` with the memory that they have `lent`, and for
each kind of sample its batch and how it is collated: `masked` for pretraining, `labelled` for classification,
`annotated` for `segmentation` and `detection`.
Looking a set over: `checkup`, `duplicates`. Names in tables that a spreadsheet opens: `cells`.
"""

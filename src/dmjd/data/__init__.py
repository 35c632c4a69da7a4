"""From a path or a name to batches; a sample depends on nothing but (seed, epoch, index).

Sources of images: `source` (what a source is, and opening one), and a file for each kind: `folder`, `table` (lists),
`archive` (zip, tar and shards), `arrays`, `hub` (Hugging Face), `prepared`, and `builtin` with the scenes of `shapes`.
A new kind is one new file that registers itself, here or in another distribution. `stored` is shared by most kinds,
`listing` finds files, `packed` keeps millions of texts or numbers in memory that all workers share, and `memory` holds
the decoded images of a small set; `single` is one image by itself; `transfer` copies to a device.
Images: `decode` (any file to a tensor at its depth), `peek` (its header), `levels` and `statistics` (range, mean and
standard deviation of its values), `crops`.
Training: `sampler` (which samples, when), `loader` and its `workers` with the memory that they have `lent`, and for
each kind of sample its batch and how it is collated: `masked` for pre-training, `labelled` for classification,
`annotated` for `segmentation` and `detection`.
Checking a set: `checkup`, `duplicates`. Names in tables that a spreadsheet opens: `cells`.
"""

"""Pictures and pages from numbers. Nothing here looks at networks, settings or data sets.

page             templates, and pictures inside a page
curves           drawings of what a run has logged
token_pictures   what of an image was hidden and what was predicted there
overlays         classes and objects drawn over an image
nearest_pictures what of the training images is most like held-out ones
strips           held-out images as one picture each, for loggers

pretraining      the page of a pre-training run
comparison       the page of several, side by side
results          what every judgement by labels leaves behind, with a page
classification   the page of a classification
dense            the page of segmentation and detection
plan             what a run will cost, as text
predictions      what a classifier says of images, as a table
search           neighbours and near-duplicates, as a table and a page
doctor           the page of a set of images: what is wrong with it, and what to do
"""

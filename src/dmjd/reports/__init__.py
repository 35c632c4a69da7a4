"""Pictures and pages from numbers. Nothing here looks at networks, settings or data sets.

page             templates, and pictures inside a page
curves           drawings of what a run has logged
token_pictures   what of an image was hidden and what was predicted there
overlays         classes and objects drawn over an image
nearest_pictures what of the training images is most like held-out ones

pretraining      the page of a pre-training run
comparison       the page of several, side by side
results          what every judgement by labels leaves behind, with a page
classification   the page of a classification
dense            the page of segmentation and detection
plan             what a run will cost, as text
"""

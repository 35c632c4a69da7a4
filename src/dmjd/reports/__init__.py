"""Pictures and pages from numbers. Nothing here looks at networks, settings or data sets.

page             templates, and pictures inside a page
curves           drawings of what a run has logged
token_pictures   what of an image was hidden and what was predicted there
overlays         classes and objects drawn over an image

pretraining      the page of a pre-training run
results          what every judgement by labels leaves behind, with a page
classification   the page of a classification
dense            the page of segmentation and detection
"""

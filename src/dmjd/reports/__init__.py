"""Pictures and pages from numbers. Nothing here runs networks or resolves settings.

page             templates, and pictures inside a page
curves           plots of the logged metrics of a run
token_pictures   hidden tokens of held-out images, and their predictions
overlays         classes and objects drawn over an image
nearest_pictures held-out images and their nearest training images
strips           held-out images as one picture each, for loggers

pretraining      the page of a pre-training run
comparison       the page of several runs, side by side
results          the files of every evaluation with labels, including its page
classification   the page of a classification
dense            the page of segmentation and detection
plan             the cost of a run, as text
predictions      a classifier's predictions, as a table
search           neighbours and near-duplicates, as a table and a page
doctor           the page of a set of images: its problems, and what to do about them
"""

"""Numbers from networks: what features and predictions are worth.

features         of images by a frozen backbone, on any device and any number of ranks
feature_file     features on disk, written as they come and read back
knn, linear      what labels say of features
neighbours       nearest images and near-duplicates
rank             what is told without labels: directions that features use, share of the hidden that is explained
monitor          all of these while a run goes on
verdict          did it learn?
shown            errors, patches and neighbours of a few held-out images, for pictures

classification   accuracy, by class too
segmentation     mean IoU
detection        average precision
dense            what the two before share
"""

"""Numbers from networks: the quality of features and predictions.

features         features of images from a frozen backbone, on any device and any number of ranks
feature_file     features on disk, written incrementally and read back
knn, linear      classifiers that measure features with labels
neighbours       nearest images and near-duplicates
rank             measures without labels: effective rank and spread of features, explained variance of hidden tokens
monitor          all of these during a run
verdict          did it learn?
shown            errors, patches and neighbours of a few held-out images, for pictures

classification   accuracy, overall and by class
segmentation     mean IoU
detection        average precision
dense            code shared by segmentation and detection
"""
